"""What can be wrong with a checkpoint that is to run quantised, found before a layer runs: each is one sentence."""

from __future__ import annotations

import torch

from ..headers import PLAIN_DTYPES, StoredTensor, refuse_undeclared_quantization
from ..readers import Reader
from .formats import FP8

# Skywork-MoE-Base-FP8's name, and that of newer files of the same format.
INPUT_SCALE_NAMES = ("input_scale", "act_scale")


def check_plain(stored: dict[str, StoredTensor], module: str) -> None:
    """A weight that is quantised while it loads.

    Args:
        stored: all tensors of the checkpoint.
        module: the linear's name in it.

    Raises:
        ValueError: it is missing or quantised already.
    """
    weight = _get(stored, f"{module}.weight")
    refuse_undeclared_quantization({weight.name: weight})


def check_fp8(stored: dict[str, StoredTensor], module: str, static: bool) -> list[StoredTensor]:
    """A linear of an FP8 checkpoint.

    Args:
        static: whether it needs a scale for its activations.

    Returns:
        Its scales, whose values are to be looked at with `check_scales`: the weight's and, if static, the inputs'.

    Raises:
        ValueError: the weight or a scale is missing or has another dtype or shape.
    """
    _expect_dtype(_get(stored, f"{module}.weight"), FP8, "fp8")
    scales = [_get(stored, f"{module}.weight_scale")]
    if static:
        names = [f"{module}.{name}" for name in INPUT_SCALE_NAMES]
        found = [stored[name] for name in names if name in stored]
        if not found:
            raise ValueError(
                f"`{names[0]}` is missing (older files call it `act_scale`): the static scheme needs a calibrated "
                'scale for each linear. `SkyworkFp8Config(activation_scheme="dynamic")` or "none" loads without.'
            )
        scales.append(found[0])
    for scale in scales:
        if scale.numel != 1 or scale.dtype not in PLAIN_DTYPES:
            raise ValueError(f"{scale} is {scale.dtype} {list(scale.shape)}: expected one float for the whole matrix.")
    return scales


def check_int8(stored: dict[str, StoredTensor], module: str) -> list[StoredTensor]:
    """A linear of an int8 checkpoint; returns and raises as `check_fp8`."""
    weight = _get(stored, f"{module}.weight")
    _expect_dtype(weight, torch.int8, "skywork_int8")
    scale = _get(stored, f"{module}.weight_scale")
    if scale.shape != weight.shape[:1] or scale.dtype not in PLAIN_DTYPES:
        raise ValueError(
            f"{scale} is {scale.dtype} {list(scale.shape)}: expected one float for each row of `{weight.name}`, "
            f"[{weight.shape[0]}]."
        )
    return [scale]


def check_scales(scales: list[StoredTensor]) -> None:
    """Look at the values of scales.

    Raises:
        ValueError: one is not a finite number above 0.
    """
    reader = Reader()
    for scale in scales:
        (value,) = reader.read([scale])
        bad = value[~((value > 0) & value.isfinite())]
        if bad.numel():
            raise ValueError(f"{scale} holds {bad[0].item()}: expected finite numbers above 0. The file is damaged.")


def _get(stored: dict[str, StoredTensor], name: str) -> StoredTensor:
    if name not in stored:
        file = next(iter(stored.values())).file
        raise ValueError(
            f"`{name}` is missing: neither {file} nor a file beside it that was read holds it. `skywork-hf inspect "
            f"{file.parent}` says what is there."
        )
    return stored[name]


def _expect_dtype(weight: StoredTensor, dtype: torch.dtype, method: str) -> None:
    if weight.dtype != dtype:
        raise ValueError(
            f"{weight} is stored as {weight.dtype}; config.json says `{method}`, so {dtype} was expected. If it is "
            "meant to stay in 16 bit, list its module in `modules_to_not_convert` of `quantization_config`."
        )
