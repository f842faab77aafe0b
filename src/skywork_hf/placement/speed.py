"""What a decoded token has to read, and so how many tokens a second there can be at most; and how many are to be
expected of the kernels that run, with launches, waits, copies and a disk, of decoding and of a prompt."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, inf, prod
from typing import Any

import torch

from ..quantization import matmul
from .devices import CPU, DISK, Device, Key
from .precision import PLAIN
from .rates import (
    EXPERT,
    FURTHER_GPU_LAUNCHES,
    LAUNCH,
    LAYER,
    LINEAR,
    TABLE_LAUNCHES,
    TABLES_LAUNCHES,
    Disk,
    Rates,
)
from .sizes import LayerParts, ModelParts, Part

# More sets of chosen experts than this are sampled, with a fixed seed; so many in each layer.
_MOST_SETS, _DRAWS = 2000, 200
# transformers' cache grows by copying: a decoded token reads it, writes it and reads it again.
_CACHE_MOVES = 3
# No expert gets more rows.
_MOST_ROWS = 2**20

Seconds = dict[tuple[str, Key], float]


@dataclass
class Reading:
    """One decoding step.

    Args:
        nbytes: by device, what a token reads there on average, weights and cache.
        seconds: by what is read, as ("experts", 0) for the experts of GPU 0, the time that it takes at the bandwidth
            of its device, where nothing else is waited for; None where a bandwidth is unknown.
    """

    nbytes: dict[Key, float]
    seconds: Seconds | None

    def tokens_per_second(self, batch_size: int) -> float | None:
        """The upper bound: no kernel reads faster, and everything else takes no time."""
        return batch_size / sum(self.seconds.values()) if self.seconds else None


@dataclass
class Expected:
    """What a plan is expected to take.

    Args:
        decode: seconds of a step that decodes one token of each sequence, by what takes them and where: "dense part"
            and "experts" are a device's kernels, "host" is the time in which no device works because the host has yet
            to launch, "waits" the host's for a GPU, "copies" those to another device, "disk" what the CPU waits for.
        prompt: the same of reading a prompt.
        prompt_tokens: of each sequence's prompt.
        measured: the devices whose speeds `skywork-hf calibrate` has measured; the others' are from tables.
    """

    decode: Seconds
    prompt: Seconds
    prompt_tokens: int
    measured: list[Key]


def largest_share(seconds: Seconds) -> tuple[str, Key, float]:
    """What takes most of the time, where, and its share of the time."""
    kind, key = max(seconds, key=lambda what: seconds[what])
    return kind, key, seconds[kind, key] / sum(seconds.values())


def expected_kernel(method: str, device: Device, dtype: torch.dtype, config: Any, rows: int = 1) -> str:
    """What an expert's linears run for so many tokens where `method` holds them: "a+b" where they run two kernels,
    "a/b" where it is unknown which. Names are those of `quantization.matmul`, and "bitsandbytes"."""
    shapes = [(config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)]
    device_type = "cuda" if device.is_gpu else "cpu"

    def names(has_unit: bool, has_triton: bool) -> Iterator[str]:
        if method.startswith("fp8"):
            scheme = "none" if method == "fp8-weight-only" else "dynamic"
            for shape in shapes:
                yield matmul.fp8_kernel(device_type, has_unit, dtype, rows, shape, scheme, has_triton)
        elif method == "int8":
            for shape in shapes:
                yield matmul.int8_kernel(device_type, dtype, rows, shape, True, has_triton)
        else:
            yield matmul.linear_kernel(device_type, dtype, rows, has_triton) if method == PLAIN else "bitsandbytes"

    may_have_unit, may_have_triton = (
        (False,) if not device.is_gpu else (True, False) if known is None else (known,)
        for known in (device.has_fp8_unit, device.has_triton)
    )
    found = {"+".join(sorted(set(names(*has)))) for has in product(may_have_unit, may_have_triton)}
    return "/".join(sorted(found))


def reading_of(
    parts: ModelParts,
    size: Callable[[Part, Key], int],
    devices: dict[Key, Device],
    dense: Sequence[Key],
    lm_head: Key,
    experts: Sequence[Sequence[Key]],
    tokens: tuple[int, int],
    loads: Sequence[Sequence[float]] | None,
) -> Reading:
    """What one step reads.

    Layers run one after another; the experts of a layer at the same time, so that the slowest device counts. Which
    experts are chosen together is taken to follow from how often each is chosen.

    Args:
        size: bytes of a part on a device.
        dense: the device of each layer's dense part.
        lm_head: that of the LM head, of which all is read; of the embeddings a token reads one row, which is nothing.
        experts: by layer, that of each expert.
        tokens: of the full cache, all sequences together, and the number of sequences.
        loads: by MoE layer, how often each expert is chosen; None for equally often.
    """
    context, batch = tokens
    nbytes: dict[Key, float] = defaultdict(float)
    seconds: dict[tuple[str, Key], float] = defaultdict(float)
    top_k = getattr(parts.config, "num_experts_per_tok", 0)

    def speed(key: Key) -> float:
        return devices[key].bandwidth or 0

    def read(kind: str, key: Key, amount: float) -> None:
        nbytes[key] += amount
        seconds[kind, key] += amount / speed(key) if speed(key) else 0

    # A tied LM head is the embeddings.
    tied = size(parts.embeddings, lm_head) if parts.is_tied else 0
    read("dense part", lm_head, size(parts.lm_head, lm_head) + tied)
    moe_layer = 0
    for layer, key, places in zip(parts.layers, dense, experts, strict=True):
        read("dense part", key, size(layer.dense, key) + parts.kv_bytes(context, batch))
        if not layer.experts:
            continue
        sizes = [size(expert, place) for expert, place in zip(layer.experts, places, strict=True)]
        load = loads[moe_layer] if loads else [1.0] * len(sizes)
        moe_layer += 1
        for chosen, probability in _chosen_sets(load, top_k, batch):
            there: dict[Key, float] = defaultdict(float)
            for expert in chosen:
                there[places[expert]] += sizes[expert] * probability
            for place, amount in there.items():
                nbytes[place] += amount
            slowest = max(there, key=lambda place: there[place] / speed(place) if speed(place) else 0)
            seconds["experts", slowest] += there[slowest] / speed(slowest) if speed(slowest) else 0
    unknown = any(amount and not speed(key) for key, amount in nbytes.items())
    return Reading(dict(nbytes), None if unknown else dict(seconds))


def _chosen_sets(load: Sequence[float], top_k: int, batch: int) -> Iterator[tuple[Sequence[int], float]]:
    """Sets of experts that a step may choose, with their probabilities, which sum to 1."""
    experts = range(len(load))
    if batch == 1 and comb(len(load), top_k) <= _MOST_SETS:
        sets = list(combinations(experts, top_k))
        weights = [prod(load[expert] for expert in chosen) for chosen in sets]
        if not any(weights):  # fewer experts were ever chosen than a token chooses
            weights = [1.0] * len(sets)
        total = sum(weights)
        return ((chosen, weight / total) for chosen, weight in zip(sets, weights, strict=True) if weight)
    draw = random.Random(0)
    return ((_draw(draw, load, top_k, batch), 1 / _DRAWS) for _ in range(_DRAWS))


def _draw(draw: random.Random, load: Sequence[float], top_k: int, batch: int) -> list[int]:
    """The experts that `batch` tokens choose, each `top_k` different ones (Efraimidis and Spirakis' keys)."""
    chosen: set[int] = set()
    chooseable = sum(map(bool, load))
    for _ in range(batch):
        if len(chosen) >= max(chooseable, top_k):
            break  # there are no others
        keys = [draw.random() ** (1 / weight) if weight else 0.0 for weight in load]
        chosen.update(sorted(range(len(load)), key=lambda expert: keys[expert])[-top_k:])
    return sorted(chosen)


@dataclass(frozen=True)
class Step:
    """A forward pass.

    Args:
        rows: tokens that it reads, of all sequences together.
        context: tokens in the cache when it is done, of all sequences together.
        sequences: how many.
    """

    rows: int
    context: int
    sequences: int

    @property
    def is_prompt(self) -> bool:
        return self.rows > self.sequences


class Machine:
    """Devices as a model meets them.

    Args:
        devices: by key.
        methods: what each holds linears as, see `Precision.methods`.
        rates: of each GPU and the CPU.
        disk: None where nobody knows how fast it is.
        dtype: of the model.
        config: the model's.
    """

    def __init__(
        self,
        devices: Mapping[Key, Device],
        methods: Mapping[Key, str],
        rates: Mapping[Key, Rates],
        disk: Disk | None,
        dtype: torch.dtype,
        config: Any,
    ) -> None:
        self.devices, self.methods, self.rates, self.disk = devices, methods, rates, disk
        self.dtype, self.config = dtype, config
        self._seconds: dict[tuple[str, str, Key, float], tuple[float, float]] = {}

    def seconds(self, kind: str, part: Part, held: Key, runs: Key, rows: float, nbytes: int = 0) -> float:
        """Of the device that `runs` a part as another holds it, LINEAR after linear or as an EXPERT; what of it is not
        quantised is a linear too. No less than reading `nbytes` takes."""
        method = self.methods[held]
        weights = sum(out * columns * number for (out, columns, _), number in part.linears.items())
        wider = self.dtype.itemsize / 2  # than rates of what is not quantised, which are of 16 bit
        per_weight, call = self._rate(kind, method, runs, rows)
        total = call + per_weight * weights * (wider if method == PLAIN else 1)
        if part.plain:
            total += self._rate(LINEAR, PLAIN, runs, rows)[0] * part.plain / 2
        return max(total, nbytes / (self.devices[runs].bandwidth or inf))

    def _rate(self, kind: str, method: str, key: Key, rows: float) -> tuple[float, float]:
        """Seconds of one weight, and of a call; of the slowest kernel where some linears run one and some another, or
        where it is unknown which."""
        if (kind, method, key, rows) not in self._seconds:
            names = expected_kernel(method, self.devices[key], self.dtype, self.config, round(rows) or 1)
            kernels = names.replace("+", "/").split("/")
            rates = self.rates[key]
            slowest = max(rates.seconds(kind, method, kernel, rows) for kernel in kernels)
            call = max(rates.call(kind, method, kernel, rows) for kernel in kernels)
            self._seconds[kind, method, key, rows] = slowest / 1e9, call
        return self._seconds[kind, method, key, rows]

    def runs_triton(self, key: Key, rows: int) -> bool:
        """Whether the experts of a GPU surely run by the Triton kernels."""
        return expected_kernel(self.methods[key], self.devices[key], self.dtype, self.config, rows) == "triton"

    def stream_from_rows(self, expert: Part, nbytes: int, gpus: Iterable[Key]) -> int | None:
        """From how many rows on every one of `gpus` has sooner copied an expert of the CPU, `nbytes`, and computed
        it, than the CPU has computed it; None for never."""

        def pays(rows: int) -> bool:
            on_cpu = self.seconds(EXPERT, expert, CPU, CPU, rows)
            there = (self.seconds(EXPERT, expert, CPU, key, rows) + nbytes / self.rates[key].streaming for key in gpus)
            return max(there) <= on_cpu

        if not pays(_MOST_ROWS):
            return None
        low, high = 0, _MOST_ROWS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high


def expected_seconds(
    machine: Machine,
    parts: ModelParts,
    size: Callable[[Part, Key], int],
    dense: Sequence[Key],
    lm_head: Key,
    experts: Sequence[Sequence[Key]],
    step: Step,
    loads: Sequence[Sequence[float]],
    stream_from_rows: int | None,
) -> Seconds:
    """What a step is expected to take; for what and where, see `Expected`. Arguments as those of `reading_of`.

    On a GPU a layer takes the larger of the host's time and its own. The experts of a layer run at the same time on
    different devices; the host, which launches them and computes those of the CPU, is one of these. Those on the disk
    are read one after the other, while the CPU computes those that are there.
    """
    walk = _Walk(machine, parts, size, step, stream_from_rows)
    # Only the last token of a prompt meets the LM head.
    walk.add("host", dense[0], machine.rates[dense[0]].step)
    head = machine.seconds(LINEAR, parts.lm_head, lm_head, lm_head, step.sequences, size(parts.lm_head, lm_head))
    if parts.is_tied:
        of = parts.embeddings
        head += machine.seconds(LINEAR, of, lm_head, lm_head, step.sequences, size(of, lm_head))
    walk.add("dense part", lm_head, head)
    counted = iter(loads)
    for number, (layer, key, places) in enumerate(zip(parts.layers, dense, experts, strict=True)):
        if number and dense[number - 1] != key:
            walk.add("copies", key, walk.copy_seconds(key, dense[number - 1]))
        walk.dense(layer, key)
        if layer.experts:
            walk.routed(layer, key, places, next(counted))
    return {what: seconds for what, seconds in walk.seconds.items() if seconds}


class _Walk:
    """Layer after layer, adding up."""

    def __init__(
        self,
        machine: Machine,
        parts: ModelParts,
        size: Callable[[Part, Key], int],
        step: Step,
        stream_from_rows: int | None,
    ) -> None:
        self.machine, self.parts, self.size, self.step = machine, parts, size, step
        self.stream_from_rows = inf if stream_from_rows is None else stream_from_rows
        self.seconds: Seconds = defaultdict(float)

    def add(self, kind: str, key: Key, seconds: float) -> None:
        self.seconds[kind, key] += seconds

    def copy_seconds(self, one: Key, other: Key) -> float:
        """Of all rows of hidden states."""
        nbytes = self.step.rows * self.parts.config.hidden_size * self.parts.itemsize
        first, second = self.machine.rates[one], self.machine.rates[other]
        between = (first.bus, second.bus) if CPU in (one, other) else (first.peer, second.peer)
        return max(first.latency, second.latency) + nbytes / min(between)

    def dense(self, layer: LayerParts, key: Key) -> None:
        """Attention, norms and gate, or a whole dense layer; on a GPU beside the host that launches them."""
        rates, step, parts = self.machine.rates[key], self.step, self.parts
        cache = parts.kv_bytes(step.context, step.sequences)
        nbytes = self.size(layer.dense, key) + (0 if step.is_prompt else cache)
        own = self.machine.seconds(LINEAR, layer.dense, key, key, step.rows, nbytes)
        own += step.rows * parts.config.hidden_size / rates.elements
        if step.is_prompt:
            own += 2 * step.rows**2 / step.sequences * parts.config.hidden_size / rates.attention
        else:
            own += (_CACHE_MOVES - 1) * cache / rates.memory
        host = rates.host(self.machine.methods[key], LAYER)
        if key == CPU:
            self.add("host", key, host)
            self.add("dense part", key, own)
        else:
            self.add(*(("host", key, host) if host > own else ("dense part", key, own)))

    def routed(self, layer: LayerParts, key: Key, places: Sequence[Key], load: Sequence[float]) -> None:
        """The experts, on average over those that may be chosen."""
        launches = self._table_launches(key, places)
        if key != CPU and (launches is None or not {CPU, DISK}.isdisjoint(places)):
            self.add("waits", key, self.machine.rates[key].wait)
        top_k, rows = self.parts.config.num_experts_per_tok, self.step.rows
        if self.step.is_prompt:
            phase = _Phase(self, key)
            total = sum(load) or 1.0
            for expert, place, share in zip(layer.experts, places, load, strict=True):
                share = min(1.0, top_k * share / total) if sum(load) else top_k / len(load)
                runs = 1 - (1 - share) ** rows
                if runs:
                    phase.add_expert(expert, place, share * rows / runs, runs)
            phase.finish(1.0)
            return
        for chosen, probability in _chosen_sets(load, top_k, rows):
            phase = _Phase(self, key, launches)
            for number in chosen:
                phase.add_expert(layer.experts[number], places[number], rows * top_k / len(chosen), 1.0)
            phase.finish(probability)

    def _table_launches(self, key: Key, places: Sequence[Key]) -> int | None:
        """How many the experts of all GPUs take together, by tables; None where they run one by one."""
        gpus = {key, *places} - {CPU, DISK}
        if key == CPU or self.step.is_prompt or not all(self.machine.runs_triton(gpu, self.step.rows) for gpu in gpus):
            return None
        return TABLE_LAUNCHES if {key, *places} == {key} else TABLES_LAUNCHES + FURTHER_GPU_LAUNCHES * (len(gpus) - 1)


class _Phase:
    """The experts of one layer that run together; `launches` as of `_table_launches`."""

    def __init__(self, walk: _Walk, key: Key, launches: int | None = None) -> None:
        self.walk, self.machine, self.key = walk, walk.machine, key
        self.gpus: Seconds = defaultdict(float)  # and beside them, one after the other, the host:
        self.streams = self.cpu = self.disk_bytes = 0.0
        self.by_tables, self.host = launches is not None, LAUNCH * (launches or 0)
        self.clock = 0.0  # of the CPU: each of its experts begins after the one before, and after it has been read

    def add_expert(self, expert: Part, place: Key, rows: float, share: float) -> None:
        """One that runs with this probability."""
        machine, key = self.machine, self.key
        nbytes = self.walk.size(expert, place)
        streams = place == CPU and key != CPU and rows >= self.walk.stream_from_rows
        runs = key if streams else CPU if place == DISK else place
        seconds = share * machine.seconds(EXPERT, expert, place, runs, rows, nbytes)
        if runs == CPU or not self.by_tables:
            self.host += share * machine.rates[runs].host(machine.methods[place], EXPERT)
        if runs != CPU:
            self.gpus["experts", runs] += seconds
            self.streams += share * nbytes / machine.rates[runs].streaming if streams else 0
            return
        if place == DISK:
            self.disk_bytes += share * nbytes
            self.clock = max(self.clock, self.machine.disk.seconds(self.disk_bytes) if self.machine.disk else 0.0)
        self.cpu += seconds
        self.clock += seconds

    def finish(self, probability: float) -> None:
        walk, key = self.walk, self.key
        gpus = {place: {"experts": seconds} for (_, place), seconds in self.gpus.items()}
        for place, kinds in gpus.items():
            if place != key:
                kinds["copies"] = 2 * walk.copy_seconds(key, place)
        host = {
            ("host", key): self.host,
            ("copies", key): self.streams + (2 * walk.copy_seconds(key, CPU) if key != CPU and self.cpu else 0),
            ("experts", CPU): self.cpu,
            ("disk", DISK): self.clock - self.cpu,
        }
        slowest = max(gpus, key=lambda place: sum(gpus[place].values()), default=None)
        if slowest is not None and sum(gpus[slowest].values()) > sum(host.values()):
            host = {(kind, slowest): seconds for kind, seconds in gpus[slowest].items()}
        for (kind, place), seconds in host.items():
            walk.add(kind, place, seconds * probability)
