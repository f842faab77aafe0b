"""What each device's linears will be held as: `quantization` in all the forms that it may be given in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from ..configuration_skywork import FP8_METHOD
from ..quantization.config import ALL, INT8_METHOD, WITHOUT_FP8, SkyworkFp8Config, SkyworkInt8Config, as_config
from ..untrusted import naming
from .devices import CPU, DISK, Device, Key, device_key

PLAIN = ""
BITSANDBYTES = ("bnb-int8", "nf4", "nf4-double")
PLAIN_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT_NAMES = (*PLAIN_NAMES, "fp8", "int8", "bnb-int8", "nf4")


@dataclass(frozen=True)
class Precision:
    """How weights are held.

    Args:
        dtype: of everything that is not quantised, and of the cache.
        methods: by device, what its linears are held as: a name of `SHORT_NAMES`, "fp8-static", "fp8-weight-only",
            "nf4-double", or "" for `dtype`.
        config: the `quantization_config` that `from_pretrained` is to be given; None where it needs none.
        quantises: whether 16-bit weights are quantised while they load.
        modules_to_not_convert: what stays in `dtype`, as the checkpoint or the asked-for config says.
        rewrites: whether weights are loaded as something else than the files hold, so that on disk there would
            have to be copies.
    """

    dtype: torch.dtype
    methods: dict[Key, str]
    config: Any
    quantises: bool
    rewrites: bool
    modules_to_not_convert: list[str] | None


def precision_of(
    config: PreTrainedConfig, quantization: Any, dtype: torch.dtype | str | None, devices: list[Device]
) -> Precision:
    """Understand `quantization`.

    Args:
        config: of the checkpoint; says whether that is quantised already.
        quantization: None for what the checkpoint is; a short name of `SHORT_NAMES`; a dict of them by device, with
            "gpu" for all GPUs, as in `{"gpu": "fp8", "cpu": "int8"}`; or a `quantization_config`.
        dtype: of what is not quantised; None or "auto" for the config's, bfloat16 where that says nothing.

    Raises:
        ValueError: a name that is unknown, or a mixture or change that no quantiser makes.
    """
    quantization = _by_key(quantization)
    with naming("`quantization_config` of config.json"):
        saved = _as_object(getattr(config, "quantization_config", None))
    if isinstance(quantization, str) and quantization in PLAIN_NAMES:
        dtype, quantization = PLAIN_NAMES[quantization], None
        if saved is not None:
            raise ValueError("The checkpoint is quantised already, so it cannot be planned in 16 bit.")
    asked = _as_object(_from_names(quantization, devices, saved))
    chosen = saved if asked is None else asked
    if saved is not None and asked is not None:
        _check_override(saved, asked)
    methods = {device.key: _method(chosen, saved, device) for device in devices}
    override = _explicit(asked, methods)
    quantises = asked is not None and saved is None
    rewrites = quantises or getattr(asked, "int8_devices", None) is not None
    kept = _modules_to_not_convert(asked if quantises else saved)
    return Precision(_dtype(config, dtype), methods, override, quantises, rewrites, kept)


def _modules_to_not_convert(config: Any) -> list[str] | None:
    return getattr(config, "modules_to_not_convert", getattr(config, "llm_int8_skip_modules", None))


def _by_key(quantization: Any) -> Any:
    """A dict of names by device under the devices' keys; one name where all are the same."""
    if not isinstance(quantization, dict) or "quant_method" in quantization:
        return quantization
    if not all(isinstance(name, str) for name in quantization.values()):
        return quantization
    names = {key if key == "gpu" else device_key(key): name for key, name in quantization.items()}
    return next(iter(names.values())) if len(set(names.values())) == 1 and {"gpu", CPU} <= names.keys() else names


def _as_object(quantization: Any) -> Any:
    quantization = as_config(quantization)
    if not isinstance(quantization, dict):
        return quantization
    method = quantization.get("quant_method")
    is_old = method is None and (quantization.get("load_in_8bit") or quantization.get("load_in_4bit"))
    if is_old or method == "bitsandbytes":  # whose older files do not name the method
        return BitsAndBytesConfig.from_dict(quantization)
    raise ValueError(
        f"`quant_method`={method!r} cannot be planned; expected one of fp8 (not in blocks), {FP8_METHOD}, "
        f"{INT8_METHOD}, bitsandbytes."
    )


def _from_names(quantization: Any, devices: list[Device], saved: Any) -> Any:
    """A `quantization_config` for short names; anything else as it is."""
    if isinstance(quantization, str):
        return _named(quantization, saved)
    if not isinstance(quantization, dict) or "quant_method" in quantization:
        return quantization
    unknown = quantization.keys() - {"gpu"} - {device.key for device in devices}
    if unknown:
        raise ValueError(f"`quantization` names {sorted(map(str, unknown))}, which are no devices of this plan.")
    names = {device.key: _name_for(device, quantization) for device in devices if device.key != DISK}
    if set(names.values()) == {"fp8", "int8"}:
        return SkyworkFp8Config(int8_devices=[key for key, name in names.items() if name == "int8"])
    if len(set(names.values())) > 1:
        raise ValueError(
            f"`quantization`={quantization!r}: only fp8 and int8 can be mixed; expected one name for all devices."
        )
    return _named(next(iter(names.values())), saved)


def _name_for(device: Device, quantization: dict[Any, str]) -> str:
    name = quantization.get(device.key, quantization.get("gpu") if device.is_gpu else None)
    if name is None:
        raise ValueError(f"`quantization`={quantization!r} says nothing of device {device.key!r}.")
    return name


def _named(name: str, saved: Any) -> Any:
    if name == "fp8":
        return SkyworkFp8Config()
    if name == "int8":
        return SkyworkFp8Config(int8_devices=ALL) if isinstance(saved, SkyworkFp8Config) else SkyworkInt8Config()
    if name == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    raise ValueError(f"`quantization`={name!r} is unknown; expected one of {', '.join(SHORT_NAMES)}.")


def _check_override(saved: Any, asked: Any) -> None:
    if type(saved) is not type(asked):
        raise ValueError(
            f"The checkpoint is quantised as {saved.quant_method} already; it cannot become {asked.quant_method}."
        )


def _method(chosen: Any, saved: Any, device: Device) -> str:
    if chosen is None:
        return PLAIN
    if isinstance(chosen, SkyworkInt8Config):
        return "int8"
    if isinstance(chosen, SkyworkFp8Config):
        if _becomes_int8(chosen.int8_devices, device):
            return "int8"
        scheme = chosen.activation_scheme or getattr(saved, "activation_scheme", None)
        return {"static": "fp8-static", "none": "fp8-weight-only"}.get(str(scheme), "fp8")
    if isinstance(chosen, BitsAndBytesConfig):
        if chosen.load_in_4bit:
            return "nf4-double" if chosen.bnb_4bit_use_double_quant else "nf4"
        return "bnb-int8"
    raise ValueError(f"`quantization`={type(chosen).__name__} cannot be planned; expected one of {SHORT_NAMES}.")


def _becomes_int8(int8_devices: Any, device: Device) -> bool:
    """As `SkyworkFp8Config` has it: "disk" counts as the CPU."""
    if int8_devices == WITHOUT_FP8:
        return not device.has_fp8_unit
    names = {CPU} if device.key == DISK else {device.key, f"cuda:{device.key}"}
    return int8_devices == ALL or not names.isdisjoint(int8_devices or ())


def _explicit(asked: Any, methods: dict[Key, str]) -> Any:
    """The devices by name where they were to be found out: the plan knows cards that this machine may not have."""
    if isinstance(asked, SkyworkFp8Config) and asked.int8_devices == WITHOUT_FP8:
        int8 = [key for key, method in methods.items() if method == "int8" and key != DISK]
        return SkyworkFp8Config(asked.activation_scheme, asked.modules_to_not_convert, int8)
    return asked


def _dtype(config: PreTrainedConfig, dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(config, "dtype", None) if dtype in (None, "auto") else dtype
    if isinstance(found, str):
        found = PLAIN_NAMES.get(found, getattr(torch, found, None))
    if not isinstance(found, torch.dtype | None) or (found is None and dtype not in (None, "auto")):
        raise ValueError(f"`dtype`={dtype!r}: expected one of bfloat16, float16, float32.")
    return found or torch.bfloat16
