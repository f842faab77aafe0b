"""Which part goes where: sizes, budgets and loads in, devices out. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .devices import CPU, DISK, Device, Key

# GPUs this much slower than the fastest still count as equally fast.
_SAME_SPEED = 0.9


class DoesNotFit(ValueError):
    """Something has no place left; `shortfall` is how many bytes are missing."""

    def __init__(self, shortfall: int) -> None:
        super().__init__(f"{shortfall} bytes are missing")
        self.shortfall = shortfall


Size = Callable[[int, Key], int]


def spread_dense(count: int, size: Size, gpus: Sequence[Device], room: Mapping[Key, int]) -> list[Key]:
    """Consecutive parts on consecutive GPUs, the fastest first and no slower ones than are needed, filled to the same
    degree; what no GPU takes, at the end, goes to the CPU.

    Args:
        count: how many parts there are, in the order of the forward pass.
        size: bytes of a part, by its number, on a device.
        gpus: in the order in which they are to be used where all are as fast.
        room: bytes that a GPU has for these parts.
    """
    tiers = _speed_tiers(gpus)
    for used in range(1, len(tiers) + 1):
        faster = [gpu.key for tier in tiers[: used - 1] for gpu in tier]
        if (placed := _level_fill(count, size, faster, [gpu.key for gpu in tiers[used - 1]], room)) is not None:
            return placed
    placed = _fill(count, size, [(gpu.key, room[gpu.key]) for tier in tiers for gpu in tier])
    return placed + [CPU] * (count - len(placed))


def _speed_tiers(gpus: Sequence[Device]) -> list[list[Device]]:
    """GPUs by speed, the fastest tier first; one tier where a speed is unknown."""
    if any(gpu.bandwidth is None for gpu in gpus):
        return [list(gpus)]
    tiers: list[list[Device]] = []
    for gpu in sorted(gpus, key=lambda gpu: -(gpu.bandwidth or 0)):
        if tiers and (gpu.bandwidth or 0) >= _SAME_SPEED * (tiers[-1][0].bandwidth or 0):
            tiers[-1].append(gpu)
        else:
            tiers.append([gpu])
    return tiers


def _level_fill(
    count: int, size: Size, faster: Sequence[Key], last: Sequence[Key], room: Mapping[Key, int]
) -> list[Key] | None:
    """Faster GPUs full, and the lowest level to which the last tier's can be filled so that everything has a place;
    None where there is none."""

    def filled(level: float) -> list[Key] | None:
        limits = [(key, room[key]) for key in faster] + [(key, int(level * room[key])) for key in last]
        placed = _fill(count, size, limits)
        return placed if len(placed) == count else None

    low, high = 0.0, 1.0
    best = filled(high)
    for _ in range(30 if best else 0):
        middle = (low + high) / 2
        if placed := filled(middle):
            best, high = placed, middle
        else:
            low = middle
    return best


def _fill(count: int, size: Size, limits: Sequence[tuple[Key, int]]) -> list[Key]:
    """Fill GPU after GPU up to its limit; stops at the first part that has no place."""
    placed: list[Key] = []
    remaining = list(limits)
    used = 0
    for part in range(count):
        while remaining and used + size(part, remaining[0][0]) > remaining[0][1]:
            remaining.pop(0)
            used = 0
        if not remaining:
            break
        used += size(part, remaining[0][0])
        placed.append(remaining[0][0])
    return placed


def spread_experts(
    loads: Sequence[Sequence[float]],
    together: Sequence[Sequence[Sequence[float]]] | None,
    gpus: Sequence[Device],
    capacity: dict[Key, int],
) -> list[list[Key]]:
    """Where each expert of each layer goes.

    What the GPUs do not hold leaves them, the least used first: to the CPU, and beyond it the least used of all to the
    disk. Those that stay are spread layer by layer so that every GPU has the same load, within that of one expert, or
    one proportional to its bandwidth where all are known; among the GPUs that keep this so, an expert goes to the one
    with which it shares the fewest tokens.

    Args:
        loads: by layer and expert, how often it is chosen; all equal where nobody counted.
        together: by layer, how often two experts are chosen for one token; None where nobody counted.
        capacity: by device, how many experts it holds.

    Raises:
        DoesNotFit: more experts than places; the shortfall is counted in experts.
    """
    everything = [(load, expert, layer) for layer, row in enumerate(loads) for expert, load in enumerate(row)]
    missing = len(everything) - sum(capacity.values())
    if missing > 0:
        raise DoesNotFit(missing)
    on_gpus = sum(capacity[gpu.key] for gpu in gpus)
    # By load, then expert by expert over all layers, so that equal loads leave every layer as much.
    leaving = sorted(everything)[: max(0, len(everything) - on_gpus)]
    on_cpu = {(layer, expert) for _, expert, layer in leaving[max(0, len(leaving) - capacity.get(CPU, 0)) :]}
    off = {(layer, expert): CPU if (layer, expert) in on_cpu else DISK for _, expert, layer in leaving}

    spreader = _LayerSpreader(gpus, capacity)
    placed = []
    for layer, row in enumerate(loads):
        staying = [expert for expert in range(len(row)) if (layer, expert) not in off]
        on_gpu = spreader.place(staying, row, together[layer] if together else None, len(loads) - layer)
        placed.append([off.get((layer, expert)) or on_gpu[expert] for expert in range(len(row))])
    return placed


class _LayerSpreader:
    """Places one layer's experts after another, remembering how full the GPUs are."""

    def __init__(self, gpus: Sequence[Device], capacity: dict[Key, int]) -> None:
        self.keys = [gpu.key for gpu in gpus]
        speeds = [gpu.bandwidth for gpu in gpus]
        fastest = max((speed or 0 for speed in speeds), default=0)
        self.speed = {
            gpu.key: gpu.bandwidth / fastest if None not in speeds and gpu.bandwidth else 1.0 for gpu in gpus
        }
        self.remaining = {key: capacity[key] for key in self.keys}
        self.total = dict.fromkeys(self.keys, 0.0)

    def place(
        self,
        experts: list[int],
        loads: Sequence[float],
        together: Sequence[Sequence[float]] | None,
        layers_left: int,
    ) -> dict[int, Key]:
        """The GPU of each of `experts`, the most used placed first."""
        quota = self._quota(len(experts), layers_left)
        here = dict.fromkeys(self.keys, 0.0)
        company: dict[Key, list[int]] = {key: [] for key in self.keys}
        largest = max((loads[expert] for expert in experts), default=0.0)
        placed: dict[int, Key] = {}
        for expert in sorted(experts, key=lambda expert: (-loads[expert], expert)):
            open_keys = [key for key in self.keys if quota[key] > 0]
            after = {key: (here[key] + loads[expert]) / self.speed[key] for key in open_keys}
            # As even as one expert allows: a GPU may be as far above the emptiest as the largest load is.
            level = min(here[key] / self.speed[key] for key in open_keys) + largest
            lowest = min(after.values())
            even = [key for key in open_keys if after[key] <= max(level, lowest)]
            chosen = min(
                even,
                key=lambda key: (
                    sum(together[expert][other] for other in company[key]) if together else 0.0,
                    after[key],
                    (self.total[key] + loads[expert]) / self.speed[key],
                    self.keys.index(key),
                ),
            )
            placed[expert] = chosen
            company[chosen].append(expert)
            here[chosen] += loads[expert]
            self.total[chosen] += loads[expert]
            quota[chosen] -= 1
            self.remaining[chosen] -= 1
        return placed

    def _quota(self, experts: int, layers_left: int) -> dict[Key, int]:
        """How many experts of this layer each GPU may take: its share of what it still holds, more where the layer
        would otherwise not fit."""
        quota = {key: -(-left // layers_left) for key, left in self.remaining.items()}
        while sum(quota.values()) < experts:
            quota = {key: min(self.remaining[key], quota[key] + 1) for key in self.keys}
        return quota
