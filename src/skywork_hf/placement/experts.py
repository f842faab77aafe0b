"""The forward of experts that are on several devices, the CPU and a disk among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from ..modeling_skywork_moe import Pairs, SkyworkMoeExperts, device_of, with_idle
from ..quantization.experts import SkyworkTritonExperts
from .devices import CPU
from .pages import pages_of, read_only_when_told, will_be_read

# The place among the runs, what computes it, and from which rows.
Work = tuple[int, Callable[[torch.Tensor], torch.Tensor], torch.Tensor]


class PlacedExperts(SkyworkTritonExperts):
    """Experts on several devices, which all compute at the same time.

    Args:
        experts: whose place it takes.
        on_disk: the numbers of those whose weights are mapped from a disk.
    """

    # From how many rows on an expert that lives on the CPU is copied to its layer's GPU and computed there, in
    # inference; None: never. Where the weights are read once for many rows, a bus can beat a CPU.
    stream_from_rows: int | None = None

    def __init__(self, experts: SkyworkMoeExperts, on_disk: set[int]) -> None:
        nn.ModuleList.__init__(self, experts)
        self.overflow, self._others_are_sharded = experts.overflow, None
        self.training = experts.training
        self.on_disk = {number: pages_of(experts[number].parameters()) for number in on_disk}
        for pages in self.on_disk.values():
            read_only_when_told(pages)
        self.read_tables()

    def read_tables(self) -> None:
        """And the devices: not asked in each forward."""
        super().read_tables()
        self.devices = [device_of(expert) for expert in self]
        self.some_on_cpu = any(device.type == CPU for device in self.devices)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As of `SkyworkMoeExperts`: a few tokens in inference by the tables, others expert by expert."""
        if self.are_here(hidden_states):
            return self.tables(hidden_states, top_k_index, top_k_weights)
        if self.tables.takes(hidden_states) and not self._streams(slice(0, len(hidden_states))):
            return self._by_tables(hidden_states, top_k_index, top_k_weights)
        return self._one_by_one(hidden_states, top_k_index, top_k_weights)

    def _by_tables(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Two launches a GPU, between which the host waits for nothing, unless there are experts that it computes."""
        here, tables = hidden_states.device, self.tables
        # Index and weights, which are sent together: int32 [2, tokens, top_k].
        routing = torch.stack([top_k_index.to(torch.int32), top_k_weights.float().view(torch.int32)])
        rows_on_cpu = hidden_states.to(CPU, non_blocking=True) if tables.on_cpu else None
        sent = [
            (hidden_states.to(device, non_blocking=True), routing.to(device, non_blocking=True))
            for device in tables.addresses
        ]
        # The rows are there too after this wait, and no GPU has begun what it would be for.
        numbers = self.overflow.read_with(routing.flatten()) if rows_on_cpu is not None else None
        sums = [tables(rows, index, weights.view(torch.float32), True) for rows, (index, weights) in sent]
        if numbers is not None and rows_on_cpu is not None:
            sums.append(
                self._on_cpu(rows_on_cpu, torch.tensor(numbers, dtype=torch.int32, device=CPU).view(routing.shape))
            )
        parts = [part.to(here, non_blocking=True) for part in sums]
        return torch.stack(parts).sum(dim=0).to(hidden_states.dtype)

    def _on_cpu(self, rows: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the CPU's experts for a few tokens: float32 [tokens, hidden_size]."""
        chosen = defaultdict(list)
        for pair, number in enumerate(routing[0].flatten().tolist()):
            if number in self.tables.on_cpu:
                chosen[number].append(pair)
        for number in chosen.keys() & self.on_disk.keys():
            will_be_read(self.on_disk[number])
        total = torch.zeros(rows.shape, device=CPU)
        weights = routing[1].view(torch.float32).flatten()
        for number, pairs in chosen.items():
            places = torch.tensor(pairs, device=CPU)
            tokens = places // routing.shape[-1]
            total.index_add_(0, tokens, self[number](rows[tokens]).float() * weights[places].unsqueeze(-1))
        return total

    def _one_by_one(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Rows are sent to all devices, then all are given their work, the CPU at last,
        then all results are gathered: a copy between devices makes both wait, so that in any other order one computes
        after the other."""
        may_idle = self._may_run_idle()
        pairs = Pairs(hidden_states, top_k_index, in_order=may_idle)
        here, experts = hidden_states.device, list(self)
        remote = here.type != CPU
        # On its way before the host waits, and there after it.
        rows_on_cpu = pairs.rows.to(CPU, non_blocking=True) if remote and self.some_on_cpu else pairs.rows
        runs = pairs.runs(len(experts), self.overflow)
        for number, _ in runs:
            if number in self.on_disk:
                will_be_read(self.on_disk[number])
        if may_idle:
            runs = with_idle(runs, experts)

        # What begins to compute by itself, in whatever time; what the host first has to copy; what it computes itself.
        elsewhere: list[Work] = []
        streamed: list[Work] = []
        on_cpu: list[Work] = []
        for place, (number, run) in enumerate(runs):
            expert, device = experts[number], self.devices[number]
            if device.type != CPU:
                rows = pairs.rows_of(run, pairs.rows)
                # accelerate moves the rows for weights that it brings.
                inputs = rows if device.type == "meta" else rows.to(device, non_blocking=True)
                elsewhere.append((place, expert, inputs))
            elif remote and self._streams(run):
                streamed.append((place, partial(compute_on, here, expert), pairs.rows_of(run, pairs.rows)))
            else:
                on_cpu.append((place, expert, pairs.rows_of(run, rows_on_cpu)))
        computed = {place: compute(inputs) for place, compute, inputs in (*elsewhere, *streamed, *on_cpu)}
        # A CPU must not read what is still on its way.
        outputs = [computed[place].to(here, non_blocking=remote) for place in range(len(runs))]
        return pairs.weighted_sum(outputs, top_k_weights)

    def _streams(self, run: slice) -> bool:
        least = self.stream_from_rows
        return least is not None and run.stop - run.start >= least and not torch.is_grad_enabled()


def compute_on(device: torch.device, expert: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The output of an expert on `rows`, with copies of its weights on `device` that are gone afterwards."""
    tensors = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    copies = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return functional_call(expert, copies, (rows,))
