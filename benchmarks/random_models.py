"""Models of random weights, made where they run: no checkpoint has to be written, and none is read."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn
from transformers.integrations.accelerate import get_device

from skywork_hf import SkyworkMoeForCausalLM
from skywork_hf.placement.dispatch import load_placed
from skywork_hf.quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear
from skywork_hf.quantization.quantizers import linears_to_quantize

FORMATS = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "nf4": 0.5625}  # bytes of a weight; of nf4 with a scale for 64


def random_linear(name: str, rows: int, columns: int, device: torch.device) -> nn.Linear:
    """A linear that holds random weights in a format."""
    if name == "nf4":
        import bitsandbytes as bnb

        linear = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        values = torch.randn(rows, columns, device=device).bfloat16() / columns**0.5
        linear.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=linear)
        return linear.to(device)
    kinds = {"int8": SkyworkInt8Linear, "fp8": SkyworkFp8Linear, "bf16": partial(nn.Linear, dtype=torch.bfloat16)}
    linear = kinds[name](columns, rows, bias=False, device=device)
    if name == "int8":
        torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device, out=linear.codes)
        linear.weight_scale.data.fill_(columns**-0.5 / 73)  # the deviation of these codes
    elif name == "fp8":
        linear.codes.copy_(torch.randn(rows, columns, device=device))
        linear.weight_scale.data.fill_(columns**-0.5)
    else:
        nn.init.normal_(linear.weight, std=columns**-0.5)
    return linear.requires_grad_(False)


def _random_model(name: Any, *, config: Any, held: str, device: torch.device, device_map: Any, **_: Any) -> Any:
    """In place of transformers' `from_pretrained`: a model by a device map, whose weights `device` makes."""
    with torch.device("meta"):
        model: Any = SkyworkMoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()

    def target(name: str) -> torch.device:
        key = get_device(device_map, name)
        return torch.device("cuda", key) if isinstance(key, int) else torch.device(key)

    for name, linear in linears_to_quantize(model, None).items():
        made = random_linear(held, linear.out_features, linear.in_features, device)
        made.path = name
        model.set_submodule(name, made.to(target(f"{name}.weight")))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.ones if parameter.dim() == 1 else torch.randn
            made = (
                values(parameter.shape, device=device).bfloat16() / parameter.shape[-1] ** (parameter.dim() - 1) ** 0.5
            )
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._parameters[own] = nn.Parameter(made.to(target(name)), requires_grad=False)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(target("model.rotary_emb.inv_freq"))
    if len(device_map) > 1:
        dispatch_model(model, device_map=device_map, skip_keys=model._skip_keys_device_placement)
    return model


def random_model(config: Any, name: str, device: torch.device, device_map: Any = None) -> Any:
    """A model that holds its linears in a format, finished as loading finishes one: hooks, kernels, and whatever these
    are compared with.

    Args:
        config: of a MoE model.
        name: the format.
        device: makes the weights.
        device_map: as of `from_pretrained`, a plan too; None: all are on `device`.
    """
    load = partial(_random_model, held=name, device=device)
    device_map = device_map or {"": 0 if device.type == "cuda" else str(device)}
    return load_placed(SkyworkMoeForCausalLM, load, config, config=config, device_map=device_map)
