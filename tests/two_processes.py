"""What each of two processes does that `test_modeling_skywork_moe_parallel.py` starts with torchrun: all of it in one
pair, since starting is what takes the time. Results go into the folder that is the argument."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import checkpoint, golden, tiny_moe_config
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from skywork_hf import SkyworkFp8Config, SkyworkInt8Config, SkyworkMoeForCausalLM
from skywork_hf.modeling_skywork_moe import SkyworkMoeExpert, SkyworkMoeSparseLayer

INT8 = SkyworkInt8Config(quantize_activations=False)
# Name: what is loaded, how, and over which processes.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "dense": ("skywork-13b-tiny", {}, {}),
    "modular": ("skywork-moe-tiny", {"experts_layout": "modular"}, {}),
    "fused": ("skywork-moe-tiny", {"experts_layout": "fused"}, {}),
    "fused, whole experts": ("skywork-moe-tiny", {"experts_layout": "fused"}, {"ep_size": 2}),
    "dense, int8": ("skywork-13b-tiny", {"quantization_config": INT8}, {}),
    "int8": ("skywork-moe-tiny", {"quantization_config": INT8}, {}),
    "FP8": ("skywork-moe-tiny", {"quantization_config": SkyworkFp8Config(activation_scheme="none")}, {}),
    "the released FP8": ("skywork-moe-tiny-fp8", {}, {}),
    "saved int8": ("saved-int8", {}, {}),
}
UNEVEN = {"num_attention_heads": {"tp_size": 2}, "num_local_experts": {"tp_size": 2, "ep_size": 2}}


def share_of_this_process(parameter: torch.Tensor) -> float:
    return parameter.to_local().numel() / parameter.numel() if isinstance(parameter, DTensor) else 1.0


def load(case: str, folder: Path, **options: Any) -> Any:
    name, keywords, _ = CASES[case]
    path = folder / name if (folder / name).exists() else checkpoint(name)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **copy.deepcopy(keywords), **options)


@torch.no_grad()
def outputs(model: Any, case: str) -> dict[str, torch.Tensor]:
    given = golden(CASES["dense" if "dense" in case else "modular"][0])
    computed = model(**{key: given[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")})
    prompt = given["input_ids"][:1][:, given["attention_mask"][0].bool()]
    greedy = model.generate(prompt, max_new_tokens=24, eos_token_id=None)[0, -24:]
    return {"logits": computed.logits, "loss": computed.loss[None], "greedy": greedy.contiguous()}


def split_by_tensors(case: str, folder: Path) -> None:
    model = load(case, folder, distributed_config=DistributedConfig(tp_size=2, **CASES[case][2]))
    model.save_pretrained(folder / case)
    rank = dist.get_rank()
    save_file(outputs(model, case), folder / case / f"outputs-{rank}.safetensors")
    shares = {key: share_of_this_process(parameter) for key, parameter in model.named_parameters()}
    (folder / case / f"shares-{rank}.json").write_text(json.dumps(shares))


def refusals(folder: Path) -> dict[str, str]:
    said = {}
    try:
        config = SkyworkFp8Config(int8_devices="all")
        name, parallel = checkpoint("skywork-moe-tiny-fp8"), DistributedConfig(tp_size=2)
        AutoModelForCausalLM.from_pretrained(name, quantization_config=config, distributed_config=parallel)
    except ValueError as error:
        said["int8_devices"] = str(error)
    for field, sizes in UNEVEN.items():
        try:
            AutoModelForCausalLM.from_pretrained(
                folder / f"uneven-{field}", distributed_config=DistributedConfig(**sizes), experts_layout="fused"
            )
        except ValueError as error:
            said[field] = str(error)
    return said


# --- data parallelism: each process has its own rows, and so its own experts without a token


def whole_model(layers: int = 2) -> SkyworkMoeForCausalLM:
    torch.manual_seed(0)
    return SkyworkMoeForCausalLM(tiny_moe_config(num_experts=[8], num_hidden_layers=layers)).eval()


@torch.no_grad()
def used_experts(model: Any, ids: torch.Tensor) -> list[list[int]]:
    return [logits.topk(2).indices.unique().tolist() for logits in model(ids, output_router_logits=True).router_logits]


def rows_of_the_processes(model: Any, equally_many: bool) -> list[torch.Tensor]:
    """Rows that leave other experts idle, in every layer."""
    for first in range(3, 60):
        rows = [torch.tensor([[first, first + 1]]), torch.tensor([[first + 2, first + 4]])]
        used = zip(*(used_experts(model, ids) for ids in rows), strict=True)
        if all(one != other and (len(one) == len(other)) == equally_many for one, other in used):
            return rows
    raise AssertionError("no such rows")


def by_layer(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def by_expert(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, SkyworkMoeExpert):
            fully_shard(module)
    return by_layer(model)


def by_fsdp1(model: Any) -> Any:
    policy = ModuleWrapPolicy({SkyworkMoeSparseLayer, SkyworkMoeExpert})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def with_checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "FSDP2 by layer": by_layer,
    "FSDP2 by expert": by_expert,
    "FSDP1 by expert": by_fsdp1,
    "DDP, checkpointing": with_checkpointing,
}


def full(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "no gradient"
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(wrap: Callable[[Any], Any], equally_many: bool) -> Iterator[tuple[str, float]]:
    """Of a wrapped model from one process that has all rows, in what is computed by turns."""
    alone = whole_model()
    rows = rows_of_the_processes(alone, equally_many)
    ids = rows[dist.get_rank()]
    wrapped = wrap(copy.deepcopy(alone))
    with torch.no_grad():
        yield "evaluation", (wrapped(ids).logits - alone(ids).logits).abs().max().item()
    generator = wrapped.module if hasattr(wrapped, "module") else wrapped
    if not isinstance(wrapped, FullyShardedDataParallel):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        yield "generation", float((generator.generate(ids, **options) != alone.generate(ids, **options)).sum())
    wrapped.train()
    wrapped(ids, labels=ids).loss.backward()
    sum(alone(row, labels=row).loss / 2 for row in rows).backward()
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            yield "training", largest_difference(wrapped.module, alone)
    else:
        yield "training", largest_difference(generator, alone)


def largest_difference(model: nn.Module, alone: nn.Module) -> float:
    gradients = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    wanted = dict(alone.named_parameters())
    return max((full(grad) - wanted[name].grad).abs().max().item() for name, grad in gradients.items())


def start_two_processes(script: Path, folder: Path) -> None:
    """Run a script of the tests twice, as a user starts it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    search = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": search}
    with subprocess.Popen([*torchrun, script, folder], env={**os.environ, **settings}) as launcher:
        try:
            assert launcher.wait(timeout=300) == 0
        finally:
            launcher.terminate()  # and with it, its ranks


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for case in CASES:
        split_by_tensors(case, folder)
    found: dict[str, Any] = {"refused": refusals(folder)}
    for name, wrap in WRAPPERS.items():
        for equally_many in (True, False) if "FSDP2" in name else (False,):
            for step, difference in differences(wrap, equally_many):
                found[f"{name}, {'equally' if equally_many else 'unequally'} many, {step}"] = difference
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
