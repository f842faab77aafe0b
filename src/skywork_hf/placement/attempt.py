"""One attempt to place all parts of a request within its budgets."""

from __future__ import annotations

from typing import Any

from .calibration import rates_of
from .devices import CPU, DISK, Device, Key
from .precision import BITSANDBYTES, PLAIN
from .problem import KINDS, Placement, Request
from .rates import Disk
from .sizes import ModelParts, Part
from .speed import Expected, Machine, Step, expected_seconds, reading_of
from .spread import DoesNotFit, spread_dense, spread_experts

# Of a prompt whose time is expected, or all that was planned for where that is less.
PROMPT_TOKENS = 2048


def place(request: Request, parts: ModelParts) -> Placement:
    """Place `parts`.

    Raises:
        DoesNotFit: not within these budgets.
    """
    return _Attempt(request, parts).place()


def expected_of(request: Request, placement: Placement) -> Expected | None:
    """What a placement is expected to take where experts are chosen as `request.usage` has it, whatever it was placed
    by; None where the speed of a device is unknown."""
    lm_head = placement.device_map[request.parts.lm_head.names[0]]
    where = placement.dense, lm_head, placement.experts, placement.stream_from_rows
    return _Attempt(request, request.parts).expected(*where)


def fits(request: Request, parts: ModelParts) -> bool:
    """Whether that is within the budgets."""
    try:
        _Attempt(request, parts).spread()
    except (DoesNotFit, ValueError):  # the latter where a checkpoint is quantised and cannot become something else
        return False
    return True


class _Attempt:
    def __init__(self, request: Request, parts: ModelParts) -> None:
        self.request, self.parts = request, parts
        self.precision = request.precision
        self.gpus = [gpu for gpu in request.gpus if gpu.budget > 0]
        self.devices = self._usable_devices()
        self.moe_layers = [layer for layer in parts.layers if layer.experts]
        self.loads, self.together = self._usage()
        # What a device that is not there would hold weights as: what the last one does.
        last = request.devices[-1].key if request.devices else CPU
        self.methods = {CPU: self.precision.methods.get(last, PLAIN), **self.precision.methods}
        self.expert_sizes = {
            key: max((self._size(part, key) for layer in self.moe_layers for part in layer.experts), default=0)
            for key in {CPU, *self.devices}
        }

    @property
    def may_stream(self) -> bool:
        """Whether experts can live on the CPU beside GPUs, to which long prompts would copy them."""
        return bool(self.moe_layers and self.gpus and CPU in self.devices)

    def _usable_devices(self) -> dict[Key, Device]:
        """All that loading allows: transformers refuses bitsandbytes' weights on the CPU beside GPUs, and only weights
        as the files have them can be on disk."""
        bitsandbytes = any(method in BITSANDBYTES for method in self.precision.methods.values())
        usable = self.gpus if bitsandbytes and self.gpus else self.request.devices
        return {device.key: device for device in usable if device.key != DISK or not self.precision.rewrites}

    def place(self) -> Placement:
        """
        Raises:
            DoesNotFit: not within the budgets.
        """
        return self._placement(*self.spread())

    def spread(self) -> tuple[list[Key], list[list[Key]], bool]:
        """The device of each dense unit and of each expert; and whether experts may live on the CPU and be copied to a
        GPU for long prompts, so that GPUs keep room for them: tried where GPUs do not hold everything.

        Raises:
            DoesNotFit: not within the budgets.
        """
        try:
            return self._spread(streams=False)
        except DoesNotFit:
            if not self.may_stream:
                raise
            return self._spread(streams=True)

    def _spread(self, streams: bool) -> tuple[list[Key], list[list[Key]], bool]:
        dense, used = self._place_dense(streams)
        return dense, self._place_experts(dense, used, streams), streams

    def _usage(self) -> tuple[list[list[float]], Any]:
        if not self.moe_layers:
            return [], None
        shape = len(self.moe_layers), len(self.moe_layers[0].experts)
        usage = self.request.usage
        if usage is None:
            return [[1.0] * shape[1] for _ in range(shape[0])], None
        if tuple(usage.counts.shape) != shape:
            raise ValueError(
                f"`expert_usage` counts {list(usage.counts.shape)} (MoE layers, experts) and the model has "
                f"{list(shape)}: collect it with this model."
            )
        return usage.shares.tolist(), (usage.together.double() / max(1, usage.tokens)).tolist()

    def _size(self, part: Part, key: Key) -> int:
        return part.nbytes(self.methods[key], self.parts.itemsize)

    def _working(self, key: Key, has_dense: bool, streams: bool) -> int:
        """Bytes that a device needs beside weights and cache."""
        if key == DISK:
            return 0
        tokens, device_type = self.request.tokens, "cpu" if key == CPU else "cuda"
        working = self.parts.expert_working_bytes(tokens) + self.parts.unpacking_bytes(self.methods[key], device_type)
        if has_dense:
            working += self.parts.dense_working_bytes(tokens, self.request.batch_size)
        if streams and key == CPU:
            working += self.parts.pinned_bytes(tokens)
        elif streams and has_dense:
            working += 2 * self.expert_sizes[CPU]  # the expert that computes, and the next one on its way
        if self.precision.quantises and key != CPU:
            working = max(working, self.parts.loading_bytes)
        return working

    def _room(self, key: Key, has_dense: bool, streams: bool) -> int:
        """Bytes that a device has for weights and cache."""
        device = self.devices[key]
        return device.budget - device.margin - self._working(key, has_dense, streams)

    @property
    def _dense_units(self) -> list[tuple[list[Part], int]]:
        """What goes to one device as a whole, in the order of the forward pass: embeddings, layers, norm and LM
        head, each with the bytes of its cache."""
        embeddings, lm_head = self.parts.embeddings, self.parts.lm_head
        cache = self.parts.kv_bytes(self.request.tokens, self.request.batch_size)
        layers = [([layer.dense], cache) for layer in self.parts.layers]
        if self.parts.is_tied:
            return [([embeddings, lm_head], 0), *layers]
        return [([embeddings], 0), *layers, ([lm_head], 0)]

    def _place_dense(self, streams: bool) -> tuple[list[Key], dict[Key, int]]:
        """The device of each dense unit, and the bytes that they take on each."""
        units = self._dense_units

        def size_of(unit: int, key: Key) -> int:
            parts, cache = units[unit]
            return sum(self._size(part, key) for part in parts) + cache

        room = {gpu.key: self._room(gpu.key, True, streams) for gpu in self.gpus}
        dense = spread_dense(len(units), size_of, self.gpus, room)
        used: dict[Key, int] = dict.fromkeys([*self.devices, CPU], 0)
        for unit, key in enumerate(dense):
            used[key] += size_of(unit, key)
        if CPU in dense:
            left = self._room(CPU, True, streams) if CPU in self.devices else 0
            if used[CPU] > left:
                experts = sum(len(layer.experts) for layer in self.moe_layers) * self.expert_sizes[CPU]
                raise DoesNotFit(used[CPU] - left + experts)
        return dense, used

    def _place_experts(self, dense: list[Key], used: dict[Key, int], streams: bool) -> list[list[Key]]:
        if not self.moe_layers:
            return [[] for _ in self.parts.layers]
        capacity = {
            key: max(0, (self._room(key, key in dense, streams) - used[key]) // self.expert_sizes[key])
            for key in self.devices
        }
        if self.may_stream and not streams:
            capacity = {key: number for key, number in capacity.items() if self.devices[key].is_gpu}
        try:
            placed = iter(spread_experts(self.loads, self.together, self.gpus, capacity))
        except DoesNotFit as error:
            raise DoesNotFit(error.shortfall * self.expert_sizes[CPU]) from None
        return [next(placed) if layer.experts else [] for layer in self.parts.layers]

    def _placement(self, dense: list[Key], experts: list[list[Key]], streams: bool) -> Placement:
        device_map: dict[str, Key] = {}
        nbytes = {device.key: dict.fromkeys(KINDS, 0) for device in self.request.devices}
        for (parts, cache), key in zip(self._dense_units, dense, strict=True):
            device_map.update((name, key) for part in parts for name in part.names)
            nbytes[key]["dense"] += sum(self._size(part, key) for part in parts)
            nbytes[key]["cache"] += cache
        for layer, keys in zip(self.parts.layers, experts, strict=True):
            for expert, key in zip(layer.experts, keys, strict=True):
                device_map[expert.names[0]] = key
                nbytes[key]["experts"] += self._size(expert, key)
        for key, kinds in nbytes.items():
            if any(kinds.values()):
                kinds |= {"working": self._working(key, key in dense, streams), "margin": self.devices[key].margin}
        layers = dense[1:] if self.parts.is_tied else dense[1:-1]
        lm_head = dense[0] if self.parts.is_tied else dense[-1]
        tokens = self.request.tokens, self.request.batch_size
        reading = reading_of(self.parts, self._size, self.devices, layers, lm_head, experts, tokens, self.loads)
        rows = self._stream_from_rows(layers, experts)
        expected = self.expected(layers, lm_head, experts, rows)
        return Placement(device_map, layers, experts, nbytes, reading, expected, rows)

    def _machine(self, guess: bool) -> Machine:
        """Of the devices whose speeds are known; with `guess`, of all."""
        request, dtype = self.request, self.precision.dtype
        devices = {CPU: Device(CPU, "", 0), **self.devices}
        rates = rates_of(devices.values(), dtype, request.calibration, guess)
        speed = devices[DISK].bandwidth if DISK in devices else None
        disk = request.calibration.disk if request.calibration else None
        return Machine(
            devices, self.methods, rates, disk or (speed and Disk(speed, 0.0)) or None, dtype, request.config
        )

    def _stream_from_rows(self, dense: list[Key], experts: list[list[Key]]) -> int | None:
        """As asked for; else, where experts of the CPU belong to layers of GPUs, as speeds have it."""
        gpus = {key for key, places in zip(dense, experts, strict=True) if key != CPU and CPU in places}
        if self.request.stream_from_rows is not None or not gpus:
            return self.request.stream_from_rows
        expert = next(layer.experts[0] for layer in self.moe_layers)
        return self._machine(guess=True).stream_from_rows(expert, self._size(expert, CPU), gpus)

    def expected(self, dense: list[Key], lm_head: Key, experts: list[list[Key]], rows: int | None) -> Expected | None:
        """None where the speed of a device that is used is unknown."""
        machine, request = self._machine(guess=False), self.request
        used = {*dense, lm_head, *(place for places in experts for place in places)}
        run = {CPU if key == DISK else key for key in used}
        if not run <= machine.rates.keys() or (DISK in used and machine.disk is None):
            return None
        prompt = min(request.context_tokens, PROMPT_TOKENS) * request.batch_size
        steps = [
            Step(request.batch_size, request.tokens, request.batch_size),
            Step(prompt, prompt, request.batch_size),
        ]
        decode, read = (
            expected_seconds(machine, self.parts, self._size, dense, lm_head, experts, step, self.loads, rows)
            for step in steps
        )
        measured = [key for key in machine.rates if key in run and machine.rates[key].is_measured]
        return Expected(decode, read, prompt // request.batch_size, measured)
