"""`plan_device_map`: from a config and budgets to a plan, or to the reason why there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..configuration_skywork import SkyworkConfig, SkyworkMoeConfig
from ..untrusted import naming, read_json
from . import saving
from .advice import Comparison, refusal, with_one_more
from .attempt import place
from .calibration import Calibration, this_machine
from .devices import Device, Key, devices_of
from .heatmap import write
from .picture import plan_figure
from .problem import Request, Solution
from .sizes import KV_CACHE_BITS
from .spread import DoesNotFit
from .text import describe
from .usage import ExpertUsage

STRATEGIES = ("experts", "layers")
_MOST_ROWS = 10**9  # tokens or sequences


class PlacementPlan(Solution):
    """Where each part and each expert of a model goes, in bytes: what `from_pretrained` is to be given, and everything
    that a person wants to know of it."""

    @property
    def title(self) -> str:
        """The model, and the sequences that were planned for."""
        return self.request.title

    @property
    def device_map(self) -> dict[str, Key]:
        """Module names to devices, for `from_pretrained`."""
        return self.placement.device_map

    @property
    def quantization_config(self) -> Any:
        """For `from_pretrained`; None where the checkpoint needs none."""
        return self.request.precision.config

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised, for `from_pretrained`."""
        return self.request.precision.dtype

    def will_it_help(self, card: str) -> Comparison:
        """What one more GPU would change; print it.

        Args:
            card: the name of a known card, as "rtx3090", or a size as "24GiB" of a card as fast as the first GPU.

        Raises:
            ValueError: no such card is known, or with it the weights cannot stay where they are.
        """
        return Comparison(card, self, with_one_more(self, card))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        saving.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> PlacementPlan:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        return cls(*saving.load(path))

    def draw(self, path: str | Path) -> None:
        """Write the picture, layers by experts in the colours of their devices, as an image. Needs matplotlib.

        Args:
            path: of the image; its ending says which kind.

        Raises:
            ImportError: matplotlib is not there.
            ValueError: an ending that is none of `heatmap.ENDINGS`.
        """
        write(plan_figure(self), path)

    def __str__(self) -> str:
        """The table of devices, the map in letters, and the bound."""
        return describe(self)


def plan_device_map(
    model: str | Path | PreTrainedConfig,
    max_memory: dict[Any, Any] | tuple[Device, ...] | None = None,
    quantization: Any = None,
    *,
    context_tokens: int | None = None,
    batch_size: int = 1,
    strategy: str = "experts",
    expert_usage: ExpertUsage | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    bandwidth: dict[Any, float] | None = None,
    stream_from_rows: int | None = None,
    kv_cache_dtype: str | None = None,
    calibration: Calibration | str | Path | None = None,
    model_class: Any = None,
    **config_options: Any,
) -> PlacementPlan:
    """Plan where each part and each expert of a model goes, from its config alone: no weights are read.

    Attention, norms, gates, embeddings and LM head, with the cache of their layers, go to the fastest GPUs; the
    experts of each layer are spread evenly over all GPUs; experts that do not fit go to the CPU, where they are
    computed.

    Args:
        model: a folder, a name on the Hub, or a config.
        max_memory: all that may be used on each device, as accelerate writes it: `{0: "22GiB", "cpu": "96GiB"}`. The
            name of a card (`{0: "rtx4090"}`) stands for what torch sees of its memory, and tells its bandwidth and
            whether it has an FP8 unit, which a size does not. None is what is free now on the devices of this machine.
            Of each GPU a margin stays free (`devices.MARGIN`). Weights on the CPU stay mapped from safetensors files,
            so "cpu" may be more than the RAM; `{"disk": ...}` takes the experts that remain.
        quantization: None for what the checkpoint is; "fp8", "int8", "bnb-int8", "nf4", "bf16", "fp16" or "fp32"; such
            names by device, as in `{"gpu": "fp8", "cpu": "int8"}`; or a `quantization_config` of `from_pretrained`.
        context_tokens: tokens of a sequence, prompt and answer; the cache of all of them, and a prompt as long, are
            reckoned with. None is `config.max_position_embeddings`.
        batch_size: sequences at a time.
        strategy: "experts", or "layers" for whole layers one after another, as a dense model always has them.
        expert_usage: counts of `collect_expert_usage`, or their file: the least used experts leave the GPUs first,
            and those often chosen together are parted.
        dtype: of what is not quantised; None for the checkpoint's.
        bandwidth: of a device's memory in GB/s, for the bound on tokens a second, where no card's name tells it:
            `{"cpu": 60}`.
        stream_from_rows: from how many rows (tokens of a prompt) on an expert that lives on the CPU is copied to its
            layer's GPU and computed there. None for what the speeds of bus, CPU and GPU say.
        kv_cache_dtype: None for `dtype`; "fp8" as engines have it, and transformers' quantised cache by that backend;
            "int8", "int4" or "int2" for transformers' quantised cache of so many bits.
        calibration: what `skywork-hf calibrate` has measured, or its file, for the expected speed. Where this
            machine's devices are planned for, of this machine; else of the one that has the CPU and the disk of the
            plan, and its GPUs where their names are the plan's. None expects what tables say.
        model_class: the class that will be loaded; None is the causal language model.
        config_options: for `AutoConfig.from_pretrained`, where `model` is no config: `revision`, `token`,
            `experts_layout`, ...

    Returns:
        The plan; `plan.device_map` and `plan.quantization_config` are what `from_pretrained` takes.

    Raises:
        ValueError: it does not fit: says how many GiB are missing and what would make it fit. Or an argument is wrong.
    """
    request = request_of(
        model, quantization, context_tokens, batch_size, dtype, strategy, model_class, **config_options
    )
    _check_for_experts(request, expert_usage=expert_usage, stream_from_rows=stream_from_rows)
    _check_counts(stream_from_rows=stream_from_rows)
    if kv_cache_dtype not in (None, *KV_CACHE_BITS):
        raise ValueError(
            f"`kv_cache_dtype`={kv_cache_dtype!r}: expected one of {', '.join(KV_CACHE_BITS)}; left away, the cache "
            "has the model's dtype."
        )
    here = max_memory is None or isinstance(max_memory, tuple)
    devices = max_memory if isinstance(max_memory, tuple) else tuple(devices_of(max_memory, bandwidth))
    usage = ExpertUsage.load(expert_usage) if isinstance(expert_usage, str | Path) else expert_usage
    calibration = Calibration.load(calibration) if isinstance(calibration, str | Path) else calibration
    if calibration is not None:
        if here:
            calibration.check_is_of(this_machine())
        devices = tuple(calibration.completed(device) for device in devices)
    asked: dict[str, Any] = {"stream_from_rows": stream_from_rows, "kv_cache_dtype": kv_cache_dtype}
    request = replace(request, devices=devices, usage=usage, calibration=calibration, **asked)
    try:
        return PlacementPlan(request, place(request, request.parts))
    except DoesNotFit as error:
        raise ValueError(refusal(request, error.shortfall)) from None


def request_of(
    model: str | Path | PreTrainedConfig,
    quantization: Any,
    context_tokens: int | None,
    batch_size: int,
    dtype: torch.dtype | str | None,
    strategy: str = "experts",
    model_class: Any = None,
    **config_options: Any,
) -> Request:
    """These arguments of `plan_device_map`, checked and understood, without devices.

    Raises:
        ValueError: an argument is wrong.
    """
    config = _config(model, config_options)
    _check(config, strategy)
    _check_counts(context_tokens=context_tokens, batch_size=batch_size)
    model_class = model_class or AutoModelForCausalLM._model_mapping[type(config)]
    return Request(
        name=_name(str(config.name_or_path) if isinstance(model, PreTrainedConfig) else model) or model_class.__name__,
        config=config,
        model_class=model_class,
        devices=(),
        quantization=quantization,
        dtype=dtype,
        context_tokens=context_tokens or config.max_position_embeddings,
        batch_size=batch_size,
        strategy=strategy,
        usage=None,
        stream_from_rows=None,
        kv_cache_dtype=None,
        calibration=None,
    )


def _name(model: str | Path) -> str:
    """What people call it: a name on the Hub, or a folder's."""
    return Path(model).name if Path(model).is_dir() else str(model)


def _config(model: str | Path | PreTrainedConfig, options: dict[str, Any]) -> PreTrainedConfig:
    if isinstance(model, PreTrainedConfig):
        for name in options:
            raise ValueError(f"`{name}` is for reading a config, and `model` is one already: set it there.")
        return model
    file = Path(model) / CONFIG_NAME
    if file.exists():
        read_json(file)  # refuses what transformers would trip over
    with naming(file if file.exists() else model):
        config, unused = AutoConfig.from_pretrained(model, return_unused_kwargs=True, **options)
    for name in unused:
        raise ValueError(f"`{name}` is unknown: expected an argument of `plan_device_map` or a field of the config.")
    return config


def _check(config: Any, strategy: str) -> None:
    if not isinstance(config, SkyworkConfig | SkyworkMoeConfig):
        raise ValueError(f"`model` is of type {config.model_type!r}: expected a Skywork model.")
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy`={strategy!r}: expected one of {', '.join(STRATEGIES)}.")
    if strategy == "experts" and getattr(config, "experts_layout", None) == "fused":
        raise ValueError(
            'experts_layout="fused" holds the experts of a layer in one tensor, which cannot be spread: leave it '
            'away, or take strategy="layers".'
        )


def _check_for_experts(request: Request, **arguments: Any) -> None:
    """Of arguments that do something only where experts are placed one by one."""
    is_dense = isinstance(request.config, SkyworkConfig)
    whole = "a dense model" if is_dense else f'strategy="{request.strategy}"'
    for name, value in arguments.items():
        if value is not None and (is_dense or request.strategy != "experts"):
            raise ValueError(f"`{name}` is for experts that are placed one by one: leave it away with {whole}.")


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and not 1 <= value <= _MOST_ROWS:
            raise ValueError(f"`{name}`={value}: expected 1 to {_MOST_ROWS:,}.")
