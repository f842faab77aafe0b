"""What was loaded, held against what was planned."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from ..modeling_skywork_moe import SkyworkMoeExperts
from ..quantization import matmul
from ..quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear, SkyworkLinear, is_plain
from .devices import CPU, DISK, GIB, Key
from .plan import PlacementPlan
from .sizes import statistics_bytes
from .text import device_name, slow_paths

logger = logging.get_logger(__name__)

# Loaded bytes may differ from the planned ones by this share.
TOLERANCE = 0.01
# So many problems are said in a message.
_MOST_SAID = 5


@dataclass
class PlacementReport:
    """A loaded model, by device.

    Args:
        weight_bytes: parameters and buffers.
        planned_bytes: the same by the plan; None without one.
        experts: by device, how many experts of which dtype run which kernel for one token, as (dtype, kernel).
        stream_from_rows: from how many rows on experts of the CPU are copied to a GPU; None for never.
        one_by_one: of how many layers the experts on GPUs run one after the other for one token, by the reason.
        problems: what is not as planned, in sentences, `unquantized` among it.
        unquantized: the linears that should have been quantised, in sentences.
    """

    weight_bytes: dict[Key, int]
    planned_bytes: dict[Key, int] | None
    experts: dict[Key, Counter[tuple[str, str]]]
    stream_from_rows: int | None
    one_by_one: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'device':10}{'GiB':>10}{'planned':>10}  experts (dtype, kernel for one token)"]
        for key in sorted(self.weight_bytes, key=str):
            planned = "-" if self.planned_bytes is None else f"{self.planned_bytes.get(key, 0) / GIB:.4g}"
            experts = ", ".join(f"{n} x {dtype} {kernel}" for (dtype, kernel), n in self.experts[key].items())
            lines.append(f"{key!s:10}{self.weight_bytes[key] / GIB:10.4g}{planned:>10}  {experts or '-'}")
        if self.stream_from_rows is not None:
            lines.append(f"experts on the CPU are copied to a GPU from {self.stream_from_rows} rows on")
        for reason, layers in self.one_by_one.items():
            lines.append(f"experts of {layers} layers run one by one on GPUs: {reason}")
        return "\n".join([*lines, *self.problems])


def placement_report(model: Any, plan: PlacementPlan | None = None, **removed: Any) -> PlacementReport:
    """Look where every parameter and every expert of a loaded model is, and how it is computed.

    Args:
        model: a loaded Skywork model.
        plan: what it was to be; None takes `model.placement_plan`, which loading by a plan leaves there.
        removed: nothing.

    Returns:
        The report; print it. What is not as planned is in its `problems`: an expert on another device or with another
        kernel, bytes that differ by more than 1 %, an expert in 16 bit in a quantised model.

    Raises:
        TypeError: another argument, such as `lenient`, which was one.
    """
    for name in removed:
        raise TypeError(
            f"`{name}` is no argument of `placement_report`, which never raises: what is not as planned is in the "
            "report's `problems`."
        )
    plan = plan or getattr(model, "placement_plan", None)
    layers = _experts_of(model)
    report = PlacementReport(
        weight_bytes=_weight_bytes(model),
        planned_bytes=None if plan is None else {key: plan.weight_bytes(key) for key in plan.bytes_per_device},
        experts=defaultdict(Counter),
        stream_from_rows=next((rows for _, e in layers if (rows := getattr(e, "stream_from_rows", None))), None),
    )
    for name, experts in layers:
        tables = getattr(experts, "tables", None)
        if tables is not None and tables.refusal and len(tables.on_cpu) < len(experts):
            report.one_by_one[tables.refusal] += 1
        for number, expert in enumerate(experts):
            is_in_table = tables is not None and tables.has(number, model.dtype)
            _look_at(f"{name}.{number}", expert, is_in_table, model, plan, report)
    if report.planned_bytes is not None:
        report.problems += _differing_bytes(report.weight_bytes, report.planned_bytes)
    report.problems[:0] = report.unquantized
    return report


def judge(problems: list[str], unquantized: list[str], strict: bool) -> None:
    """Raise ValueError where a layer that should have been quantised was not, or with `strict` where there is any
    problem; warn of the others."""
    if wrong := problems if strict else unquantized:
        raise ValueError(_in_short(wrong))
    if problems:
        logger.warning(f"{_in_short(problems)} strict_placement=True makes errors of it.")


def _in_short(problems: list[str]) -> str:
    count = f"{len(problems)} things are" if len(problems) > 1 else "One thing is"
    more = " ... `placement_report(model).problems` has them all." if len(problems) > _MOST_SAID else ""
    return f"{count} not as planned: {' '.join(problems[:_MOST_SAID])}{more}"


def log_loading(report: PlacementReport, plan: PlacementPlan) -> None:
    """Where the experts are, or a dense model's layers, and which kernels run; and, as a warning, what is slow."""
    experts = {key: sum(found.values()) for key, found in report.experts.items()}
    held = experts or Counter(plan.placement.dense)
    where = ", ".join(f"{count} on {device_name(plan, key)}" for key, count in held.items())
    logger.info(f"{plan.title}: {'experts' if experts else 'layers'} {where}.")
    kernels = ", ".join(
        f"{device_name(plan, key)}: {' and '.join(f'{dtype} {kernel}' for dtype, kernel in found)}"
        for key, found in report.experts.items()
    )
    if kernels:
        logger.info(f"Experts run for one token, by dtype and kernel, on {kernels}.")
    if slow := slow_paths(plan):
        logger.warning(f"Slow: {'. '.join(slow)}.")


def _experts_of(model: nn.Module) -> list[tuple[str, SkyworkMoeExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SkyworkMoeExperts)]


def _key_of(model: Any, name: str, tensor: torch.Tensor) -> Key:
    """The device of a tensor as a device map writes it; for one that is not in memory, where the map puts it."""
    places = getattr(model, "hf_device_map", {})
    if tensor.device.type == "meta" or (tensor.device.type == CPU and DISK in places.values()):
        return _place(places, name, str(tensor.device))
    if tensor.device.type == "cuda":
        return tensor.device.index
    return str(tensor.device)


def _place(device_map: Mapping[str, Any], name: str, unknown: Key = "no device") -> Key:
    """Where a device map has a module or tensor: by its own name, or by that of the module that it is in."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    place: Key = device_map.get(name, unknown)
    return place


def _weight_bytes(model: Any) -> dict[Key, int]:
    found: dict[Key, int] = defaultdict(int)
    # Each tied tensor comes once.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[_key_of(model, name, tensor)] += tensor.nbytes + statistics_bytes(tensor)
    return dict(found)


def _look_at(
    name: str, expert: Any, is_in_table: bool, model: Any, plan: PlacementPlan | None, report: PlacementReport
) -> None:
    """Add an expert to the report."""
    key = _key_of(model, f"{name}.w1.weight", expert.w1.weight)
    linears = {f"{name}.{part}": getattr(expert, part) for part in ("w1", "w2", "w3")}
    dtypes = "+".join(sorted({str(linear.weight.dtype).removeprefix("torch.") for linear in linears.values()}))
    kernels = {"triton" if is_in_table else kernel_of(linear, model.dtype) for linear in linears.values()}
    kernel = "+".join(sorted(kernels))
    report.experts[key][dtypes, kernel] += 1
    plain = [path for path, linear in linears.items() if is_plain(linear)]
    forgotten = [path for path in plain if _should_be_quantised(model, path)]
    report.unquantized += [f"`{path}` was left in {dtypes}, where the model is quantised." for path in forgotten]
    if plan is None:
        return
    planned = _place(plan.device_map, name)
    if planned != key:
        report.problems.append(f"`{name}` is on {key!r}, planned on {planned!r}.")
    elif key != DISK and not _keeps(model, plain) and kernel not in plan.kernel(key).split("/"):
        report.problems.append(f"`{name}` runs {kernel} on {key!r}, where {plan.kernel(key)} was planned.")


def _keeps(model: Any, plain: list[str]) -> bool:
    """Whether these linears of a quantised model are plain because its config says so."""
    return bool(plain) and getattr(model, "hf_quantizer", None) is not None


def _should_be_quantised(model: Any, path: str) -> bool:
    if getattr(model, "hf_quantizer", None) is None:
        return False
    config = model.hf_quantizer.quantization_config
    kept = getattr(config, "modules_to_not_convert", None) or getattr(config, "llm_int8_skip_modules", None)
    return should_convert_module(path, kept or [])


def kernel_of(linear: nn.Module, dtype: torch.dtype) -> str:
    """What a linear runs for one token of `dtype`; the names are those of `PlacementPlan.kernel`."""
    weight: Any = linear.weight
    device, shape = weight.device, weight.shape
    if isinstance(linear, SkyworkFp8Linear):
        has_unit = matmul.has_fp8_unit(device)
        return matmul.fp8_kernel(device.type, has_unit, dtype, 1, shape, linear.activation_scheme, linear.has_triton)
    if isinstance(linear, SkyworkInt8Linear):
        return matmul.int8_kernel(device.type, dtype, 1, shape, linear.quantize_activations, linear.has_triton)
    if isinstance(linear, SkyworkLinear):
        return matmul.linear_kernel(device.type, weight.dtype, 1)
    return "bitsandbytes" if type(linear).__module__.startswith("bitsandbytes") else "linear"


def _differing_bytes(found: dict[Key, int], planned: dict[Key, int]) -> list[str]:
    problems = []
    for key in sorted(found.keys() | planned.keys(), key=str):
        real, expected = found.get(key, 0), planned.get(key, 0)
        if abs(real - expected) > TOLERANCE * max(real, expected):
            problems.append(
                f"{key!r} holds {real / GIB:.4g} GiB of weights and {expected / GIB:.4g} GiB were planned."
            )
    return problems
