"""Loading by a plan, and what accelerate's hooks leave to be done so that weights are computed where they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.accelerate import get_device
from transformers.utils import logging

from ..modeling_skywork_moe import SkyworkMoeDecoderLayer, SkyworkMoeExperts, compute_on
from ..quantization.config import as_config
from ..quantization.linear import SkyworkQuantizedLinear
from .hardware import CPU, DISK, fastest_seconds
from .pages import read_only_when_told, will_be_read
from .plan import PlacementPlan
from .planner import plan_device_map
from .report import placement_report

logger = logging.get_logger(__name__)

EXPERTS = "experts"
# Arguments of `plan_device_map` that `from_pretrained` knows under the same name and keeps.
_SHARED = {"quantization", "dtype", "max_memory", "model_class", "model", "config_options"}
_PLANNING = set(inspect.signature(plan_device_map).parameters) - _SHARED
_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
# Rows on which the CPU is timed: enough that it computes rather than reads.
_PROBE_ROWS = 64


def load_placed(cls: Any, load: Callable[..., Any], name: Any, *model_args: Any, **kwargs: Any) -> Any:
    """`from_pretrained` with two more values for `device_map`.

    Args:
        cls: the model class.
        load: transformers' own `from_pretrained` of it.
        name: a folder or a name on the Hub.
        kwargs: those of transformers. `device_map="experts"` plans with `plan_device_map` and loads by that plan; then
            `max_memory` and `quantization_config` are the plan's, and `context_tokens`, `batch_size`, `strategy`,
            `expert_usage`, `bandwidth` and `stream_from_rows` may be given too. `device_map=plan` loads by a plan that
            was made before. `lenient_placement=True` makes warnings of the errors of the check at the end.

    Returns:
        What `load` returns. With any device map, experts on the CPU compute there. A plan is kept as
        `model.placement_plan`, and checked.

    Raises:
        ValueError: it does not fit, or what was loaded is not what was planned.
    """
    lenient = kwargs.pop("lenient_placement", False)
    if "quantization_config" in kwargs:
        kwargs["quantization_config"] = as_config(kwargs["quantization_config"])
    plan = kwargs.get("device_map")
    if plan == EXPERTS:
        plan = _plan(cls, name, kwargs)
    if not isinstance(plan, PlacementPlan):
        loaded = load(name, *model_args, **kwargs)
        compute_where_the_weights_are(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
    _check_fits(plan, cls, kwargs)
    kwargs |= {"device_map": plan.device_map, "dtype": plan.dtype, "quantization_config": plan.quantization_config}
    loaded = load(name, *model_args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.placement_plan = plan
    compute_where_the_weights_are(model, plan)
    placement_report(model, lenient=lenient)
    return loaded


def _plan(cls: Any, name: Any, kwargs: dict[str, Any]) -> PlacementPlan:
    """Plan with what `kwargs` say, taking out of them what only the planner understands."""
    planning = {key: kwargs.pop(key) for key in _PLANNING & kwargs.keys()}
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        own = {field.name for field in fields(cls.config_class)} - {"dtype"}
        options = {key: value for key, value in kwargs.items() if key in _HUB_OPTIONS | own}
        config = cls.config_class.from_pretrained(config or name, **options)
    return plan_device_map(
        config,
        kwargs.get("max_memory"),
        kwargs.get("quantization_config"),
        dtype=kwargs.get("dtype", kwargs.get("torch_dtype")),
        model_class=cls,
        **planning,
    )


def _check_fits(plan: PlacementPlan, cls: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what a plan has fixed and is given again differently; takes out of `kwargs` what the plan replaces."""
    if plan.request.model_class is not cls:
        raise ValueError(
            f"The plan is for {plan.request.model_class.__name__}, and {cls.__name__} is to be loaded: plan with "
            f"model_class={cls.__name__}."
        )
    dtype = kwargs.pop("torch_dtype", None) or kwargs.get("dtype")
    if dtype not in (None, "auto", plan.dtype, str(plan.dtype).removeprefix("torch.")):
        raise ValueError(f"`dtype`={dtype} is not the plan's {plan.dtype}: give it to plan_device_map, and not here.")
    kwargs.pop("max_memory", None)


def compute_where_the_weights_are(model: Any, plan: PlacementPlan | None = None) -> None:
    """After accelerate has dispatched a model: experts run where they live, and accelerate's hooks keep the rest.

    accelerate's "cpu" beside a GPU means that weights travel to the GPU for each token. Here an expert on the CPU is
    computed on the CPU, and by a plan so are whole layers. One on the "disk" is computed there too, from its file,
    which is mapped: accelerate would open it anew for each matrix.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not device_map or not hasattr(model, "_hf_hook"):
        return
    for name, module in model.named_modules():
        if isinstance(module, SkyworkMoeExperts):
            _free_experts(name, module, device_map)
        elif isinstance(module, SkyworkMoeDecoderLayer) and not hasattr(module, "_hf_hook"):
            # A layer whose parts are in the map, and not the layer: its inputs go where its attention is.
            attention: Any = module.self_attn
            _bring_inputs(model, module, attention._hf_hook.execution_device)
    if plan is not None:
        for name, device in device_map.items():
            module = model.get_submodule(name)
            if device == CPU and hasattr(module, "_hf_hook"):
                remove_hook_from_module(module, recurse=True)
                _bring_inputs(model, module, CPU)
        for layer, device in zip(_layers(model), plan.placement.dense, strict=True):
            if device == CPU:
                _bring_inputs(model, layer, CPU)
    _set_streaming(model, plan.request.stream_from_rows if plan else None)


def _layers(model: Any) -> nn.ModuleList:
    return getattr(model, model.base_model_prefix, model).layers


def _free_experts(name: str, experts: SkyworkMoeExperts, device_map: dict[str, Any]) -> None:
    """Take accelerate's hooks off the experts; the container moves their rows itself."""
    for number, expert in enumerate(experts):
        on_disk = get_device(device_map, f"{name}.{number}.w1.weight") == DISK
        mapped = _mapped_weights(expert) if on_disk else {}
        if mapped is None:
            continue  # they would have to be cast, and so be in memory: accelerate reads and casts them when needed
        remove_hook_from_module(expert, recurse=True)
        for path, tensor in mapped.items():
            module_name, _, tensor_name = path.rpartition(".")
            module = expert.get_submodule(module_name)
            old = module._parameters[tensor_name]
            module._parameters[tensor_name] = nn.Parameter(tensor, requires_grad=old.requires_grad)  # type: ignore[union-attr]
        if mapped:
            read_only_when_told(expert)
            experts.before_run = will_be_read


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


def _bring_inputs(model: Any, module: nn.Module, device: Any) -> None:
    """Have accelerate move what a module is called with to `device`."""
    hook = AlignDevicesHook(execution_device=device, skip_keys=model._skip_keys_device_placement)
    add_hook_to_module(module, hook)


def _set_streaming(model: Any, rows: int | None) -> None:
    """Set from how many rows on experts of the CPU are copied to their layer's GPU; measured where `rows` is None."""
    for layer in _layers(model):
        block: Any = getattr(layer, "block_sparse_moe", None)
        experts = getattr(block, "experts", None)
        if not isinstance(experts, SkyworkMoeExperts):
            continue
        on_cpu = next((expert for expert in experts if _can_stream(expert)), None)
        device = _device(block.gate)
        if on_cpu is None or device.type in (CPU, "meta"):
            continue
        if rows is None:
            rows = measured_stream_rows(on_cpu, device)
            logger.info(f"Experts on the CPU are copied to {device} from {rows} rows on (measured).")
        experts.stream_from_rows = rows


def _can_stream(expert: nn.Module) -> bool:
    """Whether an expert lives on the CPU and its weights can be used from a copy; bitsandbytes' hold more state."""
    linears = [module for module in expert.modules() if isinstance(module, nn.Linear)]
    known = all(type(linear) is nn.Linear or isinstance(linear, SkyworkQuantizedLinear) for linear in linears)
    return known and _device(expert).type == CPU


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.no_grad()
def measured_stream_rows(expert: nn.Module, device: torch.device) -> int:
    """From how many rows on copying `expert` from the CPU to `device` and computing there is faster than computing it
    on the CPU: the time of the former for few rows, in rows of the latter."""
    weight = next(expert.parameters())
    columns = expert.w1.in_features  # type: ignore[union-attr]
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16
    rows = torch.randn(_PROBE_ROWS, columns, dtype=dtype)  # type: ignore[arg-type]
    there = rows.to(device)
    on_cpu = fastest_seconds(lambda: expert(rows)) / _PROBE_ROWS
    streamed = fastest_seconds(lambda: compute_on(device, expert, there).sum().item())
    return max(1, math.ceil(streamed / on_cpu))
