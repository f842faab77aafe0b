"""How transformers loads, saves and restores models with our quantised linears (its `HfQuantizer` interface)."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.accelerate import get_device
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from ..headers import StoredTensor, read_headers
from . import checks, formats, matmul
from .config import ALL, WITHOUT_FP8, SkyworkFp8Config, SkyworkInt8Config
from .linear import SkyworkFp8Linear, SkyworkInt8Linear, SkyworkQuantizedLinear, is_plain

logger = logging.get_logger(__name__)


class _SkyworkQuantizer(HfQuantizer):
    """What FP8 and int8 share."""

    quantization_config: SkyworkFp8Config | SkyworkInt8Config
    stored_dtype: torch.dtype  # of the weights in a quantised checkpoint

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained through the frozen weights."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what is quantised while loading on disk: accelerate would read the files' 16-bit weights as that."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "The device map offloads modules to the disk, and weights that are quantised while loading are not on "
                'it: put them on "cpu", or save the model quantised first, with `save_pretrained`, and load that.'
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module_name, _, tensor_name = param_name.rpartition(".")
        quantized = isinstance(model.get_submodule(module_name), SkyworkQuantizedLinear)
        return quantized and tensor_name == "weight" and not self.pre_quantized

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Quantised weights stay as they are stored; all else is cast as in any checkpoint."""
        return None if dtype in (formats.FP8, torch.int8) else dtype

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile a forward of these linears, which it does whole."""
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        stored = _by_module_path(read_headers(checkpoint_files), model) if checkpoint_files else {}
        linears = linears_to_quantize(model, self.quantization_config.modules_to_not_convert)
        if stored:
            checks.check_scales(self._check(stored, list(linears)))
        for name, linear in linears.items():
            with torch.device("meta"):
                quantized = self._module(name, linear, stored, device_map)
            # What is missing was refused above, so transformers need not initialise it, which it cannot do for int8.
            quantized._is_hf_initialized = True  # type: ignore[assignment]
            quantized.path = name
            # transformers 5.19 casts what it reads to the dtype that it finds here, before anything is quantised.
            dtype = self.stored_dtype if self.pre_quantized else linear.weight.dtype
            quantized.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=dtype), requires_grad=False)
            model.set_submodule(name, quantized)
        model.tp_plan.update(_plan_of_scales(model))

    def _check(self, stored: dict[str, StoredTensor], names: list[str]) -> list[StoredTensor]:
        """Raise ValueError where the files do not hold what is to be loaded; the scales that are to be looked at."""
        if self.pre_quantized:
            return [scale for name in names for scale in self._check_quantized(stored, name)]
        for name in names:
            checks.check_plain(stored, name)
        return []

    @abstractmethod
    def _check_quantized(self, stored: dict[str, StoredTensor], name: str) -> list[StoredTensor]:
        """The same for the linear of that name in a quantised checkpoint."""

    @abstractmethod
    def _module(
        self, name: str, linear: nn.Linear, stored: dict[str, StoredTensor], device_map: Any
    ) -> SkyworkQuantizedLinear:
        """The quantised linear, still empty, for the linear of that name."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in _quantized_linears(model).values():
            module.requires_grad_(False)  # transformers makes what is a float, as FP8 is, trainable
        # For PEFT's `prepare_model_for_kbit_training`, which asks for methods that it knows: without, it would not
        # checkpoint activations, and make scales and all that is not quantised float32.
        model.hqq_quantized = True
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        modules = _quantized_linears(model)
        offloaded = next((name for name, module in modules.items() if module.weight.is_meta), None)
        if offloaded:
            raise ValueError(
                f"`{offloaded}` is offloaded, so it cannot be dequantised: load the model with a device map that "
                "offloads nothing."
            )
        for name, module in modules.items():
            linear = module.dequantize(dtype or model.dtype)
            if hook := getattr(module, "_hf_hook", None):
                remove_hook_from_module(module)
                add_hook_to_module(linear, hook)
            model.set_submodule(name, linear)
        model.hqq_quantized = False
        return model


class SkyworkInt8Quantizer(_SkyworkQuantizer):
    """Loads `SkyworkInt8Config`."""

    quantization_config: SkyworkInt8Config
    stored_dtype = torch.int8

    def _check_quantized(self, stored: dict[str, StoredTensor], name: str) -> list[StoredTensor]:
        return checks.check_int8(stored, name)

    def _module(self, name: str, linear: nn.Linear, *args: Any) -> SkyworkQuantizedLinear:
        return SkyworkInt8Linear(*_sizes(linear), self.quantization_config.quantize_activations is not False)


class SkyworkFp8Quantizer(_SkyworkQuantizer):
    """Loads `SkyworkFp8Config`, and the released FP8 checkpoint."""

    quantization_config: SkyworkFp8Config
    stored_dtype = formats.FP8

    @property
    def scheme(self) -> str:
        return self.quantization_config.activation_scheme or "dynamic"

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)
        if self.scheme == "static" and not self.pre_quantized:
            raise ValueError(
                'activation_scheme="static" needs scales that were calibrated on text, which a 16-bit checkpoint does '
                "not have: write a static FP8 checkpoint with conversion/calibrate_fp8.py, or take "
                'activation_scheme="dynamic".'
            )

    def is_serializable(self) -> bool:
        if self.quantization_config.int8_devices is None:
            return True
        logger.warning(
            "Part of this model became int8 while loading (`int8_devices`), and no checkpoint format holds both: load "
            'it without `int8_devices`, or with `int8_devices="all"`, to save it.'
        )
        return False

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        if self.pre_quantized and self.scheme != "static":
            ignored = {rf"\.{name}$" for name in checks.INPUT_SCALE_NAMES}
            model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What is saved: with the weights of which processes have parts put together here, as bytes, since gloo takes
        no FP8."""
        state = model.state_dict()
        parts = [name for name, part in state.items() if isinstance(part, DTensor) and part.dtype == formats.FP8]
        return (state | {name: _put_together(state[name]) for name in parts} if parts else None), {}

    def _check_quantized(self, stored: dict[str, StoredTensor], name: str) -> list[StoredTensor]:
        return checks.check_fp8(stored, name, static=self.scheme == "static")

    def _module(
        self, name: str, linear: nn.Linear, stored: dict[str, StoredTensor], device_map: Any
    ) -> SkyworkQuantizedLinear:
        if _becomes_int8(name, self.quantization_config.int8_devices, device_map):
            return SkyworkInt8Linear(*_sizes(linear))

        def scale_shape(*spellings: str) -> tuple[int, ...]:
            names = (f"{name}.{spelling}" for spelling in spellings)
            return next((stored[name].shape for name in names if name in stored), ())

        shapes = scale_shape("weight_scale"), scale_shape(*checks.INPUT_SCALE_NAMES)
        return SkyworkFp8Linear(*_sizes(linear), self.scheme, shapes)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        if not self.pre_quantized:
            return weight_conversions
        current, released = checks.INPUT_SCALE_NAMES
        renaming = WeightRenaming(rf"\.{released}", f".{current}")
        names = ["weight_scale", current, "weight"]  # as the first name that a key begins with is taken
        converter = [WeightConverter(names, "weight", [_Fp8ToInt8()])] if self.quantization_config.int8_devices else []
        return [renaming, *weight_conversions, *converter]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        super()._process_model_after_weight_loading(model)
        for module in _quantized_linears(model).values():
            if module.weight.is_meta and isinstance(module, SkyworkInt8Linear):
                module.weight = nn.Parameter(module.codes.to(torch.int8), requires_grad=False)  # as the disk has it
        # What is saved has the names that the model has, whatever the files it came from had.
        model._weight_conversions = []
        if all(isinstance(module, SkyworkInt8Linear) for module in _quantized_linears(model).values()):
            config = SkyworkInt8Config(modules_to_not_convert=self.quantization_config.modules_to_not_convert)
            model.config.quantization_config = config
            model.quantization_method = config.quant_method
            model.hf_quantizer = SkyworkInt8Quantizer(config)
        return model


def linears_to_quantize(model: Any, modules_to_not_convert: list[str] | None) -> dict[str, nn.Linear]:
    """The attention and expert linears by name: all but the head and `modules_to_not_convert`. The gate is none."""
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
    )
    return {
        name: module
        for name, module in model.named_modules()
        if is_plain(module) and should_convert_module(name, skipped)
    }


def _plan_of_scales(model: Any) -> dict[str, str]:
    """Rules of tensor parallelism for the scales, which have those of their weights otherwise: every process has them
    whole, but for int8's one a row where the rows are split."""
    whole: dict[str, str] = {}
    for name, module in _quantized_linears(model).items():
        rule = re.sub(r"\.\d+(?=\.)", ".*", name)
        by_rows = isinstance(module, SkyworkInt8Linear) and model.tp_plan.get(rule) == "colwise"
        if rule in model.tp_plan and not by_rows:
            scales = (scale for scale, _ in module.named_parameters() if scale.endswith("scale"))
            whole |= {f"{rule}.{scale}": "replicated_with_grad_allreduce" for scale in scales}
    return whole


class _Quantize(ConversionOps):
    """A 16-bit weight to what the module at its place holds."""

    def convert(self, input_dict: dict[str, Any], *patterns: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for name, weight in _one_each(input_dict).items():
            path = name.rpartition(".")[0]
            converted |= _quantized(model.get_submodule(path), path, weight)
        return converted


class _Fp8ToInt8(ConversionOps):
    """The weight and scales of one module: FP8 to int8 where the module is an int8 one, otherwise as they are."""

    def convert(
        self, input_dict: dict[str, Any], *patterns: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        tensors = _one_each(input_dict)
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if not isinstance(module, SkyworkInt8Linear):
            return {name: tensor for name, tensor in tensors.items() if getattr(module, name, None) is not None}
        weight, scale = formats.quantize_int8(tensors["weight"], tensors["weight_scale"])
        return {"weight": weight, "weight_scale": scale}


def _one_each(collected: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in collected.items()}


def _quantized(module: SkyworkQuantizedLinear, path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(module, SkyworkInt8Linear):
        split = isinstance(module.weight, DTensor)
        largest = _of_all_parts(weight.abs().amax(dim=1).float(), module.weight, (1,)) if split else None
        quantized, scale = formats.quantize_int8(weight, largest=largest)
    else:
        scale = _of_all_parts(formats.fp8_scale(weight), module.weight, (0, 1))
        quantized, scale = formats.quantize_fp8(weight, scale)
    if not scale.isfinite().all():
        raise ValueError(f"`{path}.weight` holds values that are not finite: it cannot be quantised.")
    return {f"{path}.weight": quantized, f"{path}.weight_scale": scale}


def _of_all_parts(largest: torch.Tensor, weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The largest that any process has in `largest`, where processes have parts of a weight along `dims`: these have
    one scale, as if the weight had been quantised whole."""
    if isinstance(weight, DTensor):
        for mesh_dim, placement in enumerate(weight.placements):
            if any(placement.is_shard(dim) for dim in dims):
                group = weight.device_mesh.get_group(mesh_dim)
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    return largest


def _put_together(part: Any) -> torch.Tensor:
    """The whole of a DTensor, on the CPU."""
    where = {"shape": part.shape, "stride": part.stride(), "run_check": False}
    as_bytes = DTensor.from_local(part.to_local().view(torch.uint8), part.device_mesh, part.placements, **where)
    return as_bytes.full_tensor().view(part.dtype).cpu()


def _sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def _becomes_int8(name: str, int8_devices: Any, device_map: Any) -> bool:
    """Whether the module of that name does."""
    if int8_devices is None or int8_devices == ALL:
        return bool(int8_devices == ALL)
    if isinstance(device_map, str):
        raise ValueError(
            f"`int8_devices`={int8_devices!r} has to know where each module will live, and device_map={device_map!r} "
            'is only worked out later: give the device map as a dict, or take int8_devices="all".'
        )
    device = _torch_device(get_device(device_map or {"": "cpu"}, f"{name}.weight"))
    if int8_devices == WITHOUT_FP8:
        return not matmul.has_fp8_unit(device)
    return device in map(_torch_device, int8_devices)


def _torch_device(device: Any) -> torch.device:
    """The device that a device map's entry means; "disk" counts as the CPU."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    return torch.device("cpu" if device == "disk" else device)


def _by_module_path(stored: dict[str, StoredTensor], model: Any) -> dict[str, StoredTensor]:
    """Under the names that `model` has: with or without the base model's prefix, as transformers loads either."""
    prefix = f"{model.base_model_prefix}."
    has_prefix = hasattr(model, model.base_model_prefix)
    renamed = {}
    for name, tensor in stored.items():
        if has_prefix and not name.startswith((prefix, "lm_head.", "score.")):
            name = prefix + name
        renamed[name if has_prefix else name.removeprefix(prefix)] = tensor
    return renamed


def _quantized_linears(model: nn.Module) -> dict[str, SkyworkQuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SkyworkQuantizedLinear)}
