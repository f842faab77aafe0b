"""What would make a model fit, and what one more card would change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .attempt import fits, place
from .devices import CPU, GIB, Device, device_like
from .problem import Request, Solution
from .sizes import ModelParts
from .spread import DoesNotFit
from .text import bound, expected

# Tried where something does not fit, from the least change to the largest.
_SMALLER = ("fp8", "int8", "nf4")
_MOST_GPUS = 64


@dataclass(frozen=True)
class Comparison:
    """A plan, and the one with a card more."""

    card: str
    before: Solution
    after: Solution

    @property
    def gib(self) -> float:
        """GiB that the card adds."""
        budgets = [sum(gpu.budget for gpu in plan.request.gpus) for plan in (self.before, self.after)]
        return (budgets[1] - budgets[0]) / GIB

    @property
    def experts_moved_off_the_cpu(self) -> int:
        return self.before.experts_on(CPU) - self.after.experts_on(CPU)

    def __str__(self) -> str:
        before, after = self.before, self.after
        return (
            f"One more {self.card}: {self.gib:.4g} GiB, {self.experts_moved_off_the_cpu} experts off the CPU "
            f"({before.experts_on(CPU)} before, {after.experts_on(CPU)} after)\n"
            f"  before: at most {bound(before)}; expected {expected(before)}\n"
            f"  after:  at most {bound(after)}; expected {expected(after)}"
        )


def with_one_more(plan: Solution, card: str) -> Solution:
    """The plan with one GPU more.

    Raises:
        ValueError: no such card is known, or with it the weights cannot stay where they are.
    """
    more = _with_gpus(plan.request, device_like(card, plan.request.gpus), 1)
    try:
        return replace(plan, request=more, placement=place(more, plan.request.parts))
    except DoesNotFit as error:  # as bitsandbytes' weights, which cannot stay on the CPU beside a GPU
        raise ValueError(
            f"With a {card} the model no longer fits: {error.shortfall / GIB:.4g} GiB are missing on GPUs."
        ) from None


def refusal(request: Request, shortfall: int) -> str:
    """What is missing, and the smallest changes of each kind that would do."""
    parts = request.parts
    ways = [*_smaller_weights(request, parts), *_more_gpus(request, parts), *_more_ram(request, parts)]
    where = ", ".join(f"{device.key}: {device.budget / GIB:.4g} GiB" for device in request.devices)
    margin = f" (of which {request.gpus[0].margin / GIB:.3g} GiB of each GPU are its margin)" if request.gpus else ""
    advice = f"It would fit with {', or with '.join(ways)}." if ways else "No smaller weights and no more GPUs help."
    return (
        f"{request.name} does not fit into {where or 'no devices'}{margin}: "
        f"{shortfall / GIB:.4g} GiB are missing for {request.batch_size} x {request.context_tokens:,} tokens. {advice}"
    )


def _smaller_weights(request: Request, parts: ModelParts) -> list[str]:
    for name in _SMALLER:
        if fits(replace(request, quantization=name), parts):
            return [f'quantization="{name}"']
    return []


def _more_gpus(request: Request, parts: ModelParts) -> list[str]:
    if not request.gpus:
        return []
    largest = max(request.gpus, key=lambda gpu: gpu.budget)
    for count in range(1, _MOST_GPUS + 1):
        if fits(_with_gpus(request, largest, count), parts):
            what = largest.name or f"{largest.budget / GIB:.4g} GiB"
            return [f"{count} more GPU{'s' if count > 1 else ''} of {what}"]
    return []


def _more_ram(request: Request, parts: ModelParts) -> list[str]:
    """The least whole GiB for the CPU, found by halving."""
    budget = next((device.budget for device in request.devices if device.key == CPU), 0)
    low, high = budget // GIB, 2 ** math.ceil(math.log2(budget / GIB + 1))
    while not fits(_with_ram(request, high * GIB), parts):
        low, high = high, 2 * high
        if high > 2**14:
            return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(_with_ram(request, middle * GIB), parts) else (middle, high)
    return [f"{high} GiB for the CPU ({budget / GIB:.4g} GiB now)"]


def _with_gpus(request: Request, like: Device, count: int) -> Request:
    """`count` more GPUs."""
    numbers = [device.key for device in request.devices if isinstance(device.key, int)]
    first = max(numbers, default=-1) + 1
    added = [replace(like, key=first + n, has_context=False) for n in range(count)]
    others = [device for device in request.devices if not device.is_gpu]
    return replace(request, devices=(*request.gpus, *added, *others), quantization=_for_more_gpus(request))


def _for_more_gpus(request: Request) -> Any:
    """The request's `quantization`, saying of GPUs to come what it says of those there are."""
    asked = request.quantization
    if not isinstance(asked, dict) or "quant_method" in asked:
        return asked
    first = next((asked[gpu.key] for gpu in request.gpus if gpu.key in asked), None)
    return asked if first is None else {"gpu": first, **asked}


def _with_ram(request: Request, budget: int) -> Request:
    """Another budget for the CPU."""
    others = tuple(device for device in request.devices if device.key != CPU)
    known = next((device for device in request.devices if device.key == CPU), Device(CPU, "", 0, None, False))
    return replace(request, devices=(*others, replace(known, budget=budget)))
