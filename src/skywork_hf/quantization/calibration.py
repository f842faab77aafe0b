"""Static FP8: scales for the activations, measured on text once, so that none has to be measured while generating."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from . import formats
from .config import SkyworkFp8Config
from .linear import SkyworkFp8Linear
from .quantizers import SkyworkFp8Quantizer, linears_to_quantize

logger = logging.get_logger(__name__)

_EXPERT = re.compile(r"(?<=\.experts)\.\d+(?=\.)")


@torch.no_grad()
def calibrate(model: Any, texts: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run texts through a 16-bit model and note the largest input of each linear.

    An expert that no token reached gets the largest scale of its layer's other experts, and a warning counts these.

    Args:
        model: a Skywork causal language model in the modular layout.
        texts: token ids, int64 [1, tokens] each.

    Returns:
        For each linear that FP8 quantises, by name, the float32 scale of no dimensions that puts the largest input
        seen at e4m3's largest value.

    Raises:
        ValueError: there is no text, or an input was not finite.
    """
    largest: dict[str, torch.Tensor] = {}
    linears = linears_to_quantize(model, None)
    hooks = [linear.register_forward_pre_hook(_observer(name, largest)) for name, linear in linears.items()]
    try:
        for ids in tqdm(list(texts), desc="Calibrating", unit="text"):
            model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not largest:
        raise ValueError("Calibration needs at least one text.")
    for name, value in largest.items():
        if not value.isfinite():
            raise ValueError(
                f"The inputs of `{name}` hold values that are not finite: the model overflows on these texts."
            )
    return {name: value / formats.FP8_MAX for name, value in _with_unreached(largest, list(linears)).items()}


def quantize_static(model: Any, input_scales: dict[str, torch.Tensor]) -> Any:
    """Turn a 16-bit model into a static FP8 one, in place, one linear after the other.

    Args:
        input_scales: as `calibrate` returns them.

    Returns:
        `model`, which `save_pretrained` now writes in the layout of Skywork-MoE-Base-FP8.
    """
    config = SkyworkFp8Config("static")
    for name, linear in tqdm(linears_to_quantize(model, None).items(), desc="Quantising", unit="linear"):
        quantized = _static_linear(linear, input_scales[name])
        quantized.path = name
        model.set_submodule(name, quantized)
    model.hf_quantizer = SkyworkFp8Quantizer(config)
    model.hf_quantizer.postprocess_model(model)
    model.is_quantized, model.quantization_method = True, config.quant_method
    return model


def _static_linear(linear: nn.Linear, input_scale: torch.Tensor) -> SkyworkFp8Linear:
    quantized = SkyworkFp8Linear(
        linear.in_features, linear.out_features, linear.bias is not None, "static", device="meta"
    )
    weight, scale = formats.quantize_fp8(linear.weight.detach())
    tensors = {
        "weight": weight,
        "weight_scale": scale,
        "input_scale": input_scale.to(weight.device),
        "bias": linear.bias,
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(quantized, name, nn.Parameter(tensor.detach(), requires_grad=False))
    return quantized


def _observer(name: str, largest: dict[str, torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
    def note(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        value = inputs[0].abs().amax().float()
        largest[name] = torch.maximum(largest[name], value) if name in largest else value

    return note


def _with_unreached(largest: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    siblings = defaultdict(list)
    for name, value in largest.items():
        siblings[_EXPERT.sub("", name)].append(value.cpu())
    unreached = [name for name in names if name not in largest]
    if unreached:
        experts = {name.rpartition(".")[0] for name in unreached}
        logger.warning(
            f"{len(experts)} experts were reached by no token and get the largest scale of their layer's other "
            f"experts: more text would measure them. The first: {sorted(experts)[0]}."
        )
    return {name: largest[name] if name in largest else max(siblings[_EXPERT.sub("", name)]) for name in names}
