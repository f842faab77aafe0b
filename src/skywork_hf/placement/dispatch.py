"""Loading by a plan, and what accelerate's hooks leave to be done so that weights are computed where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.accelerate import check_and_set_device_map, get_device
from transformers.utils import logging

from ..modeling_skywork_moe import SkyworkMoeBlock, SkyworkMoeExperts
from ..quantization.config import as_config
from ..quantization.experts import use_cpu_kernels, use_gpu_kernels
from ..quantization.linear import SkyworkQuantizedLinear, is_plain
from .devices import CPU, DISK, Key, devices_of
from .experts import PlacedExperts
from .machine import differences
from .plan import PlacementPlan, plan_device_map
from .rates import STREAM_FROM_ROWS
from .report import judge, log_loading, placement_report

logger = logging.get_logger(__name__)

EXPERTS = "experts"
_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}


def load_placed(
    cls: Any,
    load: Callable[..., Any],
    name: Any,
    *model_args: Any,
    device_map: Any = None,
    context_tokens: int | None = None,
    batch_size: int | None = None,
    strategy: str | None = None,
    expert_usage: Any = None,
    bandwidth: dict[Any, float] | None = None,
    stream_from_rows: int | None = None,
    kv_cache_dtype: str | None = None,
    calibration: Any = None,
    strict_placement: bool = False,
    **kwargs: Any,
) -> Any:
    """`from_pretrained` with two more values for `device_map`.

    Args:
        cls: the model class.
        load: transformers' own `from_pretrained` of it.
        name: a folder or a name on the Hub.
        device_map: as transformers takes it. "experts" plans with `plan_device_map` and loads by that plan; then
            `max_memory`, `quantization_config` and `dtype` are the plan's. A plan that was made before is loaded by;
            then these three, and what the config says of the model's shape, may only be given as they were planned.
        context_tokens, batch_size, strategy, expert_usage, bandwidth, stream_from_rows, kv_cache_dtype, calibration:
            those of `plan_device_map`, with `device_map="experts"` alone; None for its defaults.
        strict_placement: make errors of the warnings of what is not as planned, here and in what was loaded; with
            "experts" or a plan alone.
        kwargs: those of transformers.

    Returns:
        What `load` returns. With any device map, experts on the CPU compute there. A plan is kept as
        `model.placement_plan`, and checked.

    Raises:
        ValueError: it does not fit, the plan's GPUs are not here or smaller, a layer that should have been quantised
            was not, or an argument would do nothing.
    """
    planning = {
        "context_tokens": context_tokens,
        "batch_size": batch_size,
        "strategy": strategy,
        "expert_usage": expert_usage,
        "bandwidth": bandwidth,
        "stream_from_rows": stream_from_rows,
        "kv_cache_dtype": kv_cache_dtype,
        "calibration": calibration,
    }
    planning = {key: value for key, value in planning.items() if value is not None}
    if "lenient_placement" in kwargs:
        raise ValueError(
            "`lenient_placement` is gone: what is not as planned is warned of, and `strict_placement=True` makes "
            "errors of it."
        )
    _check_arguments(device_map, planning, strict_placement)
    if "quantization_config" in kwargs:
        kwargs["quantization_config"] = as_config(kwargs["quantization_config"])
    plan = None
    if device_map == EXPERTS:
        plan = _plan(cls, name, kwargs, planning)
    elif isinstance(device_map, PlacementPlan):
        plan = device_map
        _check_fits(plan, cls, name, kwargs)
    if plan is not None:
        judge(differences(plan), [], strict_placement)
        for replaced in ("torch_dtype", "max_memory"):
            kwargs.pop(replaced, None)
        device_map = plan.device_map
        kwargs |= {"dtype": plan.dtype, "quantization_config": plan.quantization_config}
    loaded = load(name, *model_args, device_map=device_map, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if plan is not None:
        model.placement_plan = plan
    compute_where_the_weights_are(model, plan)
    use_cpu_kernels(model)
    use_gpu_kernels(model)
    if plan is not None:
        report = placement_report(model)
        judge(report.problems, report.unquantized, strict_placement)
        log_loading(report, plan)
    return loaded


def _check_arguments(device_map: Any, planning: dict[str, Any], strict: bool) -> None:
    """Refuse a `device_map` that nobody knows, and what would do nothing beside the one that is given."""
    if device_map == EXPERTS:
        return
    if isinstance(device_map, str):
        try:
            check_and_set_device_map(device_map)
        except ValueError as error:
            raise ValueError(
                f'`device_map`={device_map!r} is unknown: expected "{EXPERTS}", a plan of `plan_device_map`, or what '
                f"transformers takes. {error}"
            ) from None
    planned = isinstance(device_map, PlacementPlan)
    for name in planning:
        raise ValueError(
            f'`{name}` is for device_map="{EXPERTS}": '
            + ("a plan has its own, so give it to `plan_device_map`." if planned else "else nothing is planned.")
        )
    if strict and not planned:
        raise ValueError(f'`strict_placement` is for device_map="{EXPERTS}" or a plan: else nothing is checked.')


def _config(cls: Any, name: Any, kwargs: dict[str, Any]) -> Any:
    """What `from_pretrained` will make its config of."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    own = {field.name for field in fields(cls.config_class)} - {"dtype"}
    options = {key: value for key, value in kwargs.items() if key in _HUB_OPTIONS | own}
    return cls.config_class.from_pretrained(config or name, **options)


def _plan(cls: Any, name: Any, kwargs: dict[str, Any], planning: dict[str, Any]) -> PlacementPlan:
    devices = devices_of(kwargs.get("max_memory"), planning.pop("bandwidth", None), here=True)
    return plan_device_map(
        _config(cls, name, kwargs),
        tuple(devices),
        kwargs.get("quantization_config"),
        dtype=kwargs.get("dtype") or kwargs.get("torch_dtype"),
        model_class=cls,
        **planning,
    )


def _check_fits(plan: PlacementPlan, cls: Any, name: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what a plan has fixed and is given again differently."""
    request, asked = plan.request, kwargs.get("quantization_config")
    if request.model_class is not cls:
        raise ValueError(
            f"The plan is for {request.model_class.__name__}, and {cls.__name__} is to be loaded: plan with "
            f"model_class={cls.__name__}."
        )
    for key in ("dtype", "torch_dtype"):
        if kwargs.get(key) not in (None, "auto", plan.dtype, str(plan.dtype).removeprefix("torch.")):
            raise _not_planned(key, kwargs[key], plan.dtype)
    planned_memory = {device.key: device.budget for device in request.devices}
    memory = kwargs.get("max_memory")
    if (
        memory is not None
        and {device.key: device.budget for device in devices_of(memory, here=True)} != planned_memory
    ):
        raise _not_planned("max_memory", memory, planned_memory)
    config = _config(cls, name, kwargs)
    here = replace(request, config=config, dtype=plan.dtype, quantization=asked or request.quantization)
    one, other = here.precision, request.precision
    if (one.methods, one.modules_to_not_convert) != (other.methods, other.modules_to_not_convert):
        raise _not_planned("quantization_config", _named(one.methods), _named(other.methods))
    own = {field.name for field in fields(type(config))} - {field.name for field in fields(PreTrainedConfig)}
    changed = [field for field in sorted(own) if getattr(config, field) != getattr(request.config, field)]
    if changed and replace(here.parts, config=request.config) != replace(request.parts, config=request.config):
        values, planned = (", ".join(str(getattr(of, field)) for field in changed) for of in (config, request.config))
        raise _not_planned("`, `".join(changed), values, planned)


def _named(methods: dict[Key, str]) -> dict[Key, str]:
    return {key: method or "not quantised" for key, method in methods.items()}


def _not_planned(name: str, value: Any, planned: Any) -> ValueError:
    return ValueError(f"`{name}`={value} is not the plan's {planned}: give it to plan_device_map, and not here.")


def compute_where_the_weights_are(model: Any, plan: PlacementPlan | None = None) -> None:
    """After accelerate has dispatched a model: experts run where they live, and of accelerate's hooks those stay that
    do something.

    accelerate's "cpu" beside a GPU means that weights travel to the GPU for each token. Here an expert on the CPU is
    computed on the CPU, and by a plan so are whole layers. One on the "disk" is computed there too, from its file,
    which is mapped: accelerate would open it anew for each matrix.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not device_map or not hasattr(model, "_hf_hook"):
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, SkyworkMoeExperts):
            model.set_submodule(name, PlacedExperts(module, on_disk=_free_experts(name, module, device_map)))
    if plan is not None:
        for name, device in device_map.items():
            module = model.get_submodule(name)
            if device == CPU and hasattr(module, "_hf_hook"):
                remove_hook_from_module(module, recurse=True)
                add_hook_to_module(module, _aligned(model, CPU))
    _one_hook_a_layer(model)
    _set_streaming(model, plan.placement.stream_from_rows if plan else STREAM_FROM_ROWS)


def _free_experts(name: str, experts: SkyworkMoeExperts, device_map: dict[str, Any]) -> set[int]:
    """Take accelerate's hooks off the experts, as `PlacedExperts` moves rows itself; the numbers of those that are
    mapped from a disk."""
    on_disk = set()
    for number, expert in enumerate(experts):
        is_on_disk = get_device(device_map, f"{name}.{number}.w1.weight") == DISK
        mapped = _mapped_weights(expert) if is_on_disk else {}
        if mapped is None:
            continue  # they would have to be cast, and so be in memory: accelerate reads and casts them when needed
        remove_hook_from_module(expert, recurse=True)
        for path, tensor in mapped.items():
            module_name, _, tensor_name = path.rpartition(".")
            module = expert.get_submodule(module_name)
            old = module._parameters[tensor_name]
            module._parameters[tensor_name] = nn.Parameter(tensor, requires_grad=old.requires_grad)  # type: ignore[union-attr]
        if mapped:
            on_disk.add(number)
    return on_disk


def _mapped_weights(expert: nn.Module) -> dict[str, torch.Tensor] | None:
    """The weights of an expert that accelerate keeps on the disk, mapped from their files; None where a file has
    another dtype than the model."""
    mapped = {}
    for path, parameter in expert.named_parameters():
        module_name, _, tensor_name = path.rpartition(".")
        hook: Any = expert.get_submodule(module_name)._hf_hook
        weights = hook.weights_map
        entry = weights.dataset.index[f"{weights.prefix}{tensor_name}"]
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            tensor = file.get_tensor(entry["weight_name"])
        if tensor.dtype != parameter.dtype:
            return None
        mapped[path] = tensor
    return mapped


def _one_hook_a_layer(model: Any) -> None:
    """accelerate hooks each part of a layer, and each of their matrices. Where all of them are on one device to stay,
    one hook on the layer does, and none where everything comes from that device."""
    decoder = getattr(model, model.base_model_prefix, model)
    home, copies = _device_of_all(decoder.embed_tokens), Copies()
    if home is not None:
        model._hf_hook.execution_device = home  # accelerate's is any GPU of the map
    before = of_positions = home if _device_of_all(decoder.rotary_emb) == home else None
    for layer in decoder.layers:
        device = _device_of_all(layer)
        if device is not None:
            for module in _without_experts(layer):
                remove_hook_from_module(module)
            if not device == before == of_positions:
                add_hook_to_module(layer, LayerHook(device, model._skip_keys_device_placement, copies))
        elif not hasattr(layer, "_hf_hook"):
            # A layer whose parts are in the map, and not the layer: its inputs go where its attention is.
            add_hook_to_module(layer, _aligned(model, layer.self_attn._hf_hook.execution_device))
        before = device
    decoder.register_forward_hook(copies.forget, always_call=True)


def _device_of_all(module: nn.Module) -> torch.device | None:
    """The one device that all of a module but its experts is on; None where there are several, or where accelerate
    brings weights there and takes them away again."""
    devices = set()
    for part in _without_experts(module):
        if getattr(getattr(part, "_hf_hook", None), "offload", False):
            return None
        devices |= {
            tensor.device for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None
        }
    return devices.pop() if len(devices) == 1 else None


def _without_experts(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it, but what is in the container of a layer's experts."""
    yield module
    if not isinstance(module, SkyworkMoeExperts):
        for child in module.children():
            yield from _without_experts(child)


def _aligned(model: Any, device: Any) -> AlignDevicesHook:
    """accelerate's hook that moves what a module is called with to `device`."""
    return AlignDevicesHook(execution_device=device, skip_keys=model._skip_keys_device_placement)


class Copies:
    """Copies on other devices of what all layers are called with, as cosines, sines and masks: made once a device, and
    kept until the forward ends."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], tuple[Any, Any]] = {}

    def on(self, device: torch.device, value: Any) -> Any:
        """`value`, a tensor or what else has `to`, on `device`."""
        if torch.compiler.is_compiling():
            return value.to(device)
        source, copy = self._made.get((id(value), device), (None, None))
        if source is not value:
            copy = value.to(device)
            self._made[id(value), device] = value, copy  # with the source, so that no other gets its id
        return copy

    def forget(self, *_: Any) -> None:
        """A hook of the decoder, at the end of its forward."""
        self._made.clear()


class LayerHook(ModelHook):
    """Brings what a decoder layer is called with to the device of the layer."""

    def __init__(self, device: torch.device, skip_keys: Iterable[str], copies: Copies) -> None:
        self.device, self.skip_keys, self.copies = device, frozenset(skip_keys), copies

    def pre_forward(self, module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for name, value in kwargs.items():
            if name not in self.skip_keys:
                kwargs[name] = self._bring(value)
        return (hidden_states.to(self.device), *map(self._bring, args)), kwargs

    def _bring(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.device == self.device else self.copies.on(self.device, value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._bring, value))
        return self.copies.on(self.device, value) if hasattr(value, "to") else value  # as a BlockMask


def _set_streaming(model: Any, rows: int | None) -> None:
    """Set from how many rows on experts of the CPU are copied to their layer's GPU."""
    blocks = (module for module in model.modules() if isinstance(module, SkyworkMoeBlock))
    for block in blocks:
        experts = block.experts
        if isinstance(experts, PlacedExperts) and _device(block.gate).type not in (CPU, "meta"):
            experts.stream_from_rows = rows if any(map(_can_stream, experts)) else None


def _can_stream(expert: nn.Module) -> bool:
    """Whether an expert lives on the CPU and its weights can be used from a copy; bitsandbytes' hold more state."""
    linears = [module for module in expert.modules() if isinstance(module, nn.Linear)]
    known = all(is_plain(linear) or isinstance(linear, SkyworkQuantizedLinear) for linear in linears)
    return known and _device(expert).type == CPU


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
