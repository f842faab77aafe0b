"""The models over several processes: the plans that say which weights are split, and what two processes compute."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from tiny import LAYOUTS, checkpoint, golden, tiny_dense_config, tiny_moe_config
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from two_processes import CASES

from skywork_hf import (
    SkyworkForCausalLM,
    SkyworkForSequenceClassification,
    SkyworkModel,
    SkyworkMoeForCausalLM,
    SkyworkMoeModel,
)
from skywork_hf.compat import SPLITS_UNEVEN_HEADS
from skywork_hf.modeling_skywork_moe import SkyworkMoeDenseLayer, SkyworkMoeSparseLayer

# In the two-layer gate `0` and `2`.
REPLICATED = {"norm", "input_layernorm", "post_attention_layernorm", "gate", "0", "2", "score"}
if not SPLITS_UNEVEN_HEADS:
    REPLICATED |= {"embed_tokens", "lm_head"}
SPLIT_BY_COLUMNS = {"o_proj", "w2", "down_proj"}


def as_in_plans(name: str) -> str:
    """The name of a module or parameter with `*` for the numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def module_of(parameter: str) -> str:
    return parameter.removesuffix(".weight").rpartition(".")[2]


DENSE = [(cls, tiny_dense_config()) for cls in (SkyworkModel, SkyworkForCausalLM, SkyworkForSequenceClassification)]
MOE = [
    (cls, tiny_moe_config(experts_layout=layout, **changes))
    for cls in (SkyworkMoeModel, SkyworkMoeForCausalLM)
    for layout in LAYOUTS
    for changes in ({}, {"moe_expert_interval": 2, "moe_2layer_gate": True})
]
all_models = pytest.mark.parametrize(("model_class", "config"), DENSE + MOE)


@all_models
def test_every_rule_of_the_plans_names_a_module_or_parameter(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> None:
    model = model_class(config)
    names = {as_in_plans(name) for name, _ in [*model.named_modules(), *model.named_parameters()]}
    assert model.tp_plan.keys() | model.ep_plan.keys() <= names


@all_models
def test_the_tensor_parallel_plan_splits_all_but_norms_and_gates(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> None:
    model = model_class(config)
    names = [name for name, _ in model.named_parameters()]
    whole = {module_of(name) for name in names if as_in_plans(name.removesuffix(".weight")) not in model.tp_plan}
    assert whole <= REPLICATED


def test_only_the_fused_layout_has_a_plan_for_whole_experts() -> None:
    modular, fused = (tiny_moe_config(experts_layout=layout) for layout in LAYOUTS)
    assert modular.base_model_ep_plan is None
    assert set(fused.base_model_ep_plan.values()) == {"grouped_gemm", "ep_dispatch_experts"}


LAYERS = {
    SkyworkForCausalLM(tiny_dense_config()): {LlamaDecoderLayer},
    SkyworkMoeForCausalLM(tiny_moe_config()): {SkyworkMoeSparseLayer},
    SkyworkMoeForCausalLM(tiny_moe_config(moe_expert_interval=2)): {SkyworkMoeDenseLayer, SkyworkMoeSparseLayer},
}


@pytest.mark.parametrize("model", LAYERS)
def test_accelerate_and_peft_wrap_the_layers_that_are_there(model: PreTrainedModel) -> None:
    for version in (1, 2):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy="transformer_based_wrap")
        if version == 1:
            plugin.set_auto_wrap_policy(model)
            assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == LAYERS[model]
        else:
            wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
            assert {type(module) for module in model.modules() if wraps(module)} == LAYERS[model]
    peft = pytest.importorskip("peft")
    _, layers = peft.utils.other.fsdp_auto_wrap_policy(peft.get_peft_model(model, peft.LoraConfig())).keywords[
        "policies"
    ]
    assert LAYERS[model] <= layers.keywords["transformer_layer_cls"]
    assert model._no_split_modules == {layer.__name__ for layer in LAYERS[model]}


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes, started as a user starts them, wrote what they computed."""
    folder = tmp_path_factory.mktemp("ranks")
    two_processes.load("int8", folder).save_pretrained(folder / "saved-int8")
    for field in two_processes.UNEVEN:
        odd = {"num_attention_heads": 3, "hidden_size": 36} if field == "num_attention_heads" else {field: 3}
        SkyworkMoeForCausalLM(tiny_moe_config(**odd)).save_pretrained(folder / f"uneven-{field}")
    two_processes.start_two_processes(Path(two_processes.__file__), folder)
    return folder


@functools.cache
def of_one_process(case: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The outputs, golden ones where there are some, and the weights under the Hub's names."""
    name, keywords, _ = CASES[case]
    if keywords.keys() & {"experts_layout"} or (not keywords and name == "skywork-13b-tiny"):
        expected = golden(name)
        outputs = {key: expected[key] for key in ("logits", "loss")} | {"greedy": expected["greedy_single"][0, -24:]}
        return outputs, AutoModelForCausalLM.from_pretrained(checkpoint(name)).state_dict()
    model = two_processes.load(case, folder)
    return two_processes.outputs(model, case), model.state_dict()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_processes_has_half_the_weights_and_the_outputs_of_one(
    of_two_processes: Path, case: str, rank: int
) -> None:
    expected, _ = of_one_process(case, of_two_processes)
    outputs = load_file(of_two_processes / case / f"outputs-{rank}.safetensors")
    mask = golden(CASES["dense" if "dense" in case else "modular"][0])["attention_mask"].bool()
    torch.testing.assert_close(outputs["logits"][mask], expected["logits"][mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(outputs["loss"], expected["loss"], atol=1e-5, rtol=0)
    assert outputs["greedy"].equal(expected["greedy"])

    shares = json.loads((of_two_processes / case / f"shares-{rank}.json").read_text())
    for name, share in shares.items():
        halves = module_of(name) not in REPLICATED
        if name.endswith("_scale"):  # int8's are split with their rows
            halves = "int8" in case and module_of(name.replace("_scale", "")) not in SPLIT_BY_COLUMNS
        # The vocabulary's 4007 rows have no halves.
        assert share == (pytest.approx(0.5, abs=1e-3) if halves else 1), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_save_the_checkpoint_that_they_loaded(of_two_processes: Path, case: str) -> None:
    saved: dict[str, torch.Tensor] = {}
    for file in (of_two_processes / case).glob("model*.safetensors"):
        saved |= load_file(file)
    _, loaded = of_one_process(case, of_two_processes)
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert tensor.equal(loaded[name]), name


def test_what_does_not_divide_is_refused_by_name(of_two_processes: Path) -> None:
    refused = found_by_two_processes(of_two_processes, 0)["refused"]
    assert "`tp_size`=2 does not divide `num_attention_heads`=3: take one of 1, 3" in refused["num_attention_heads"]
    assert "`int8_devices` makes int8 of whole FP8 matrices" in refused["int8_devices"]
    assert "`ep_size`=2 does not divide `num_local_experts`=3: take one of 1, 3" in refused["num_local_experts"]


def found_by_two_processes(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"found-{rank}.json").read_text())


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_with_other_idle_experts_compute_what_one_process_does(of_two_processes: Path, rank: int) -> None:
    found = found_by_two_processes(of_two_processes, rank)
    del found["refused"]
    for wrapper in two_processes.WRAPPERS:
        of_wrapper = {name for name in found if name.startswith(f"{wrapper}, ")}
        # FSDP1 does not generate
        assert len(of_wrapper) == {"FSDP1 by expert": 2, "DDP, checkpointing": 3}.get(wrapper, 2 * 3)
    assert {name: difference for name, difference in found.items() if difference > 2e-6} == {}
