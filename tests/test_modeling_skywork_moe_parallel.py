"""The models over several processes: the plans that say which weights are split, and what two processes compute.

torchrun runs this file too: it is then what each of the two processes does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYOUTS, checkpoint, golden, tiny_dense_config, tiny_moe_config
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from skywork_hf import (
    SkyworkForCausalLM,
    SkyworkForSequenceClassification,
    SkyworkModel,
    SkyworkMoeForCausalLM,
    SkyworkMoeModel,
)

CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "dense": ("skywork-13b-tiny", {}, {}),
    "modular": ("skywork-moe-tiny", {"experts_layout": "modular"}, {}),
    "fused": ("skywork-moe-tiny", {"experts_layout": "fused"}, {}),
    "fused, whole experts": ("skywork-moe-tiny", {"experts_layout": "fused"}, {"ep_size": 2}),
}
# In the two-layer gate `0` and `2`.
REPLICATED = {"norm", "input_layernorm", "post_attention_layernorm", "gate", "0", "2", "score"}


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


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes, started as a user starts them, wrote what they computed."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*torchrun, __file__, str(folder)], env=environment) as launcher:
        try:
            assert launcher.wait(timeout=300) == 0
        finally:
            launcher.terminate()  # and with it, its ranks
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_processes_has_half_the_weights_and_the_golden_outputs(
    of_two_processes: Path, case: str, rank: int
) -> None:
    expected = golden(CASES[case][0])
    outputs = load_file(of_two_processes / case / f"outputs-{rank}.safetensors")
    mask = expected["attention_mask"].bool()
    torch.testing.assert_close(outputs["logits"][mask], expected["logits"][mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(outputs["loss"], expected["loss"], atol=1e-5, rtol=0)
    assert outputs["greedy"].equal(expected["greedy_single"][0, -24:])

    shares = json.loads((of_two_processes / case / f"shares-{rank}.json").read_text())
    for name, share in shares.items():
        # The vocabulary's 4007 rows have no halves.
        assert share == (1 if module_of(name) in REPLICATED else pytest.approx(0.5, abs=1e-3)), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_save_the_checkpoint_that_they_loaded(of_two_processes: Path, case: str) -> None:
    saved: dict[str, torch.Tensor] = {}
    for file in (of_two_processes / case).glob("model*.safetensors"):
        saved |= load_file(file)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint(CASES[case][0])).state_dict()
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert tensor.equal(loaded[name]), name


def share_of_this_process(parameter: torch.Tensor) -> float:
    return parameter.to_local().numel() / parameter.numel() if isinstance(parameter, DTensor) else 1.0


@torch.no_grad()
def compute(case: str, folder: Path) -> None:
    name, keywords, sizes = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(name), distributed_config=DistributedConfig(tp_size=2, **sizes), **keywords
    )
    given = golden(name)
    outputs = model(**{key: given[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")})
    prompt = given["input_ids"][:1][:, given["attention_mask"][0].bool()]
    greedy = model.generate(prompt, max_new_tokens=24, eos_token_id=None)[0, -24:]

    model.save_pretrained(folder)
    rank = torch.distributed.get_rank()
    tensors = {"logits": outputs.logits, "loss": outputs.loss[None], "greedy": greedy.contiguous()}
    save_file(tensors, folder / f"outputs-{rank}.safetensors")
    shares = {key: share_of_this_process(parameter) for key, parameter in model.named_parameters()}
    (folder / f"shares-{rank}.json").write_text(json.dumps(shares))


if __name__ == "__main__":
    for case in CASES:
        compute(case, Path(sys.argv[1]) / case)
