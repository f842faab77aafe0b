"""What a user asks for, and what `config.json` of a quantised checkpoint says."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..configuration_skywork import FP8_METHOD, is_our_fp8

ACTIVATION_SCHEMES = ("static", "dynamic", "none")
INT8_METHOD = "skywork_int8"
# Values of `int8_devices` beside a list of devices.
WITHOUT_FP8, ALL = "without_fp8", "all"


class SkyworkFp8Config(QuantizationConfigMixin):
    """FP8 (e4m3) with one scale for each weight matrix, the format of Skywork-MoE-Base-FP8.

    Such a checkpoint needs no config to load. Given for one, the arguments that are not None override what its
    `config.json` says. Given for a 16-bit checkpoint, it is quantised while it loads.

    Args:
        activation_scheme: "static" multiplies FP8 activations that the checkpoint's calibrated `input_scale` scales,
            "dynamic" those that are scaled by their own largest value, "none" never quantises activations. None is
            what the checkpoint says, or "dynamic" for a 16-bit one. All three are weight-only where there is no FP8
            unit: on a CPU, and on GPUs of compute capability below 8.9.
        modules_to_not_convert: names, ends of names or patterns of modules that stay in 16 bit. The head always does.
        int8_devices: linears that will live there become int8 while loading, see `SkyworkInt8Config`: "without_fp8"
            (the CPU, and GPUs below 8.9), "all", or a list such as `["cpu", 1]`. Devices are those of the device map;
            without one, everything lives on the CPU.

    Raises:
        ValueError: a value that is none of these; names the argument.
    """

    def __init__(
        self,
        activation_scheme: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        int8_devices: str | list[str | int] | None = None,
    ) -> None:
        self.quant_method = FP8_METHOD  # type: ignore[assignment]
        self.activation_scheme = activation_scheme
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.int8_devices = int8_devices
        if activation_scheme is not None and activation_scheme not in ACTIVATION_SCHEMES:
            raise ValueError(
                f"`activation_scheme`={activation_scheme!r} is unknown; expected one of "
                f"{', '.join(ACTIVATION_SCHEMES)}."
            )
        if int8_devices not in (None, WITHOUT_FP8, ALL) and not _are_devices(int8_devices):
            raise ValueError(
                f"`int8_devices`={int8_devices!r}: expected {WITHOUT_FP8!r}, {ALL!r} or a list of devices such as "
                "['cpu', 1]."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read `quantization_config` of a `config.json`: AutoFP8's and vLLM's spelling.

        Raises:
            ValueError: the scheme is missing or unknown.
        """
        scheme = "none" if config_dict.get("weight_only") else config_dict.get("activation_scheme")
        if scheme is None:
            raise ValueError(
                "`quantization_config` with FP8 has no `activation_scheme`; expected one of "
                f"{', '.join(ACTIVATION_SCHEMES)}."
            )
        skipped = config_dict.get("modules_to_not_convert") or config_dict.get("ignored_layers")
        config = cls(scheme, skipped, config_dict.get("int8_devices"))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says. vLLM's `fp8` method knows no "none": for it that is "dynamic"."""
        scheme = self.activation_scheme or "dynamic"
        written: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": scheme}
        if scheme == "none":
            written.update(activation_scheme="dynamic", weight_only=True)
        if self.modules_to_not_convert:
            written["modules_to_not_convert"] = self.modules_to_not_convert
        return written

    def get_loading_attributes(self) -> dict[str, Any]:
        """What overrides the config of a checkpoint that is in FP8 already."""
        own = {"activation_scheme": self.activation_scheme, "int8_devices": self.int8_devices}
        return {name: value for name, value in own.items() if value is not None}


class SkyworkInt8Config(QuantizationConfigMixin):
    """Symmetric int8 with one scale for each row of a weight matrix (each output), for CPUs and any GPU.

    Given for a 16-bit checkpoint, it is quantised while it loads. A saved int8 checkpoint needs no config to load.

    Args:
        quantize_activations: None or True runs many rows at once with int8 activations, one scale for each token,
            where the device has a fast integer matmul (see `docs/quantization.md`); few rows are always weight-only.
            False never quantises activations.
        modules_to_not_convert: names, ends of names or patterns of modules that stay in 16 bit. The head always does.

    Raises:
        ValueError: a value that is none of these; names the argument.
    """

    def __init__(
        self, quantize_activations: bool | None = None, modules_to_not_convert: list[str] | None = None
    ) -> None:
        if quantize_activations not in (None, True, False):
            raise ValueError(f"`quantize_activations`={quantize_activations!r}: expected True or False.")
        self.quant_method = INT8_METHOD  # type: ignore[assignment]
        self.quantize_activations = quantize_activations
        self.modules_to_not_convert = _names(modules_to_not_convert)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read `quantization_config` of a `config.json`."""
        config = cls(config_dict.get("quantize_activations"), config_dict.get("modules_to_not_convert"))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says: what is not None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What overrides the config of a checkpoint that is in int8 already."""
        return {} if self.quantize_activations is None else {"quantize_activations": self.quantize_activations}


def as_config(quantization: Any) -> Any:
    """`quantization_config` of `from_pretrained`: an object of ours for a dict that `to_dict` of one writes, which
    transformers would take for its own FP8; anything else as it is."""
    if is_our_fp8(quantization):
        return SkyworkFp8Config.from_dict(quantization)
    if isinstance(quantization, dict) and quantization.get("quant_method") == INT8_METHOD:
        return SkyworkInt8Config.from_dict(quantization)
    return quantization


def _are_devices(devices: Any) -> bool:
    return isinstance(devices, list | tuple) and all(isinstance(device, str | int) for device in devices)


def _names(modules: list[str] | None) -> list[str] | None:
    if modules is not None and (isinstance(modules, str) or not all(isinstance(name, str) for name in modules)):
        raise ValueError(f"`modules_to_not_convert`={modules!r}: expected a list of module names.")
    return None if modules is None else list(modules)
