"""Where the experts of a layer are, for kernels that read on their device which of them were chosen."""

from __future__ import annotations

from functools import partial
from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..modeling_skywork_moe import device_of
from . import gpu_kernels
from .cards import MAX_TOKENS, TABLE_COLUMNS
from .linear import SkyworkQuantizedLinear, is_plain
from .matmul import KERNEL_INPUTS, reference_linear

HOST = "cpu"
MATRICES = ("w1", "w3", "w2")
SCALES = (torch.bfloat16, torch.float16, torch.float32)
# As places in a weight are counted in 32 bits.
_MAX_ELEMENTS = 2**31 - 1


# A weight, and its scale if it has one.
Matrix = tuple[torch.Tensor, torch.Tensor | None]


class Refusal(Exception):
    """Why the kernels cannot compute something, in a sentence."""


class ExpertTables:
    """The addresses of the weights of a layer's experts, a table for each GPU that has some.

    They are made when a model is placed. `takes` looks whether a module or a weight was replaced or moved since, or
    has got a hook, and reads all again; not in a compiled forward, whose guards see other modules, as adapters, but no
    other weight in the same module: after that, call `read`.

    Args:
        experts: all experts of a layer, with the names and the meaning of `SkyworkMoeExpert`'s parts.

    Attributes:
        addresses: by device, int64 [experts, 6], on that device; see `triton_kernels.experts`.
        on_cpu: the numbers of those that are on the CPU, in no table.
        refusal: why the kernels do not run, in a sentence; None if they do.
    """

    addresses: dict[torch.device, torch.Tensor]
    on_cpu: frozenset[int]
    refusal: str | None
    _forms: dict[torch.device, Any]  # the arguments of `triton_kernels.experts` after the table
    _inputs: tuple[torch.dtype, ...]

    def __init__(self, experts: nn.ModuleList) -> None:
        self._container = experts
        self.read()

    def takes(self, hidden_states: torch.Tensor) -> bool:
        """Whether the tables compute this: a few tokens in 16 bit, in inference, by experts that the kernels know."""
        is_few = 0 < len(hidden_states) <= MAX_TOKENS
        if not is_few or torch.is_grad_enabled() or hidden_states.device.type == HOST or is_cast(hidden_states):
            return False
        if torch.compiler.is_compiling():
            linears = [modules.get(name) for modules, name in self._places]
            if not all(one is other for one, other in zip(linears, self._linears, strict=False)):
                return False
        elif not self._is_as_read():
            self.read()
        return self.refusal is None and hidden_states.dtype in self._inputs

    @property
    def is_on_one_gpu(self) -> bool:
        """Whether all experts are there, and the kernels compute them."""
        return self.refusal is None and not self.on_cpu and len(self.addresses) == 1

    def has(self, number: int, dtype: torch.dtype) -> bool:
        """Whether a few tokens of `dtype` meet an expert by its table."""
        return self.refusal is None and number not in self.on_cpu and dtype in self._inputs

    def __call__(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        is_partial: bool = False,
    ) -> torch.Tensor:
        """The weighted sum of the outputs of the chosen experts that are on the device of the arguments; see
        `triton_kernels.experts`."""
        table, form = self.addresses[hidden_states.device], self._forms[hidden_states.device]
        return gpu_kernels.kernels.experts(hidden_states, top_k_index, top_k_weights, table, *form, is_partial)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose weights are elsewhere: all is read again before they are used."""
        unread: dict[str, Any] = {"_places": [], "_linears": [None], "_forms": {}, "_inputs": (), "addresses": {}}
        refusal = "they were copied, and did not run since"
        return {**unread, "_container": self._container, "on_cpu": frozenset(), "refusal": refusal}

    @torch.no_grad()
    def read(self) -> None:
        """Note where everything is, and refuse what the kernels cannot do. For a form of experts that is new on a
        device, block sizes are chosen and the kernels are compared with the reference path, which both take time."""
        self._experts = list(self._container)
        self._places = [(expert._modules, name) for expert in self._experts for name in MATRICES]
        self._linears: list[Any] = [modules.get(name) for modules, name in self._places]
        self._parameters = [
            (linear._parameters, name)
            for linear in self._linears
            for name in ("weight", "weight_scale")
            if linear is not None
        ]
        self._pointers = self._pointers_now()
        modules = [module for module in (*self._experts, *self._linears) if module is not None]
        self._hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._attributes = [module.__dict__ for module in modules]
        self._is_hooked = self._is_hooked_now()
        self.addresses, self._forms, self._inputs = {}, {}, KERNEL_INPUTS
        try:
            self._fill()
            self.refusal = None
        except Refusal as refusal:
            self.refusal = str(refusal)

    def _is_as_read(self) -> bool:
        # Each decoded token comes here once a layer.
        linears = [modules.get(name) for modules, name in self._places]
        return (
            linears == self._linears
            and list(self._container) == self._experts
            and self._pointers_now() == self._pointers
            and self._is_hooked_now() == self._is_hooked
        )

    def _pointers_now(self) -> list[int | None]:
        found = [parameters.get(name) for parameters, name in self._parameters]
        return [None if parameter is None else parameter.data_ptr() for parameter in found]

    def _is_hooked_now(self) -> bool:
        """Whether a module does more than its class says: by hooks of torch, or accelerate's forwards."""
        return any(self._hooks) or any(map(contains, self._attributes, repeat("forward")))

    def _fill(self) -> None:
        places = [device_of(expert) for expert in self._experts]
        self.on_cpu = frozenset(number for number, place in enumerate(places) if place.type == HOST)
        devices = {place for place in places if place.type != HOST}
        if not devices:
            raise Refusal("no expert is on a GPU")
        for device in devices:
            if not gpu_kernels.has_triton(device):
                is_brought = device.type == "meta"
                raise Refusal(
                    "weights are brought by accelerate" if is_brought else f"{device} does not run the kernels"
                )
        if self._is_hooked:
            raise Refusal("an expert has a hook, which the kernels would pass over")
        for device in devices:
            here = {number: self._matrices(number) for number, place in enumerate(places) if place == device}
            self._add(device, here)

    def _matrices(self, number: int) -> list[Matrix]:
        expert = self._experts[number]
        if type(expert.act_fn) is not type(ACT2FN["silu"]):
            raise Refusal(f"expert {number} has another activation than silu")
        matrices = [matrix(f"w{name[1]} of expert {number}", expert._modules.get(name)) for name in MATRICES]
        if len({weight.device for weight, _ in matrices}) > 1:
            raise Refusal(f"the matrices of expert {number} are on several devices")
        return matrices

    def _add(self, device: torch.device, here: dict[int, list[Matrix]]) -> None:
        """The table of a device."""
        forms = {_form(number, matrices) for number, matrices in here.items()}
        if len(forms) != 1:
            raise Refusal("the experts of a device differ in size or dtype")
        ((intermediate_size, weight_dtype, scale_dtype),) = forms
        rows = [[0] * TABLE_COLUMNS for _ in self._experts]
        for number, matrices in here.items():
            rows[number] = [0 if tensor is None else tensor.data_ptr() for pair in matrices for tensor in pair]
        is_aligned = not any(address % 16 for row in rows for address in row[::2])
        self._forms[device] = (intermediate_size, weight_dtype, scale_dtype, is_aligned)
        if weight_dtype in KERNEL_INPUTS:
            self._inputs = tuple(dtype for dtype in self._inputs if dtype == weight_dtype)
        self.addresses[device] = torch.tensor(rows).to(device)
        # A compiled forward that is replayed reads it where it is.
        torch._dynamo.mark_static_address(self.addresses[device])
        self._compare(device, list(here.items())[:2])

    def _compare(self, device: torch.device, some: list[tuple[int, list[Matrix]]]) -> None:
        weight = some[0][1][0][0]
        width, dtype = weight.shape[1], weight.dtype if weight.dtype in KERNEL_INPUTS else KERNEL_INPUTS[0]
        inputs = gpu_kernels.sample(MAX_TOKENS, width, dtype, device)
        index = torch.tensor([number for number, _ in some]).to(device).expand(len(inputs), -1).contiguous()
        weights = torch.full(index.shape, 1 / len(some), device=device)

        def run(tokens: int) -> torch.Tensor:
            return self(inputs[:tokens], index[:tokens], weights[:tokens])

        def reference(tokens: int) -> torch.Tensor:
            return torch.stack([_reference(inputs[:tokens], matrices) for _, matrices in some]).float().mean(dim=0)

        if device.type == "cuda":
            try:
                gpu_kernels.kernels.tune(device, lambda is_alone: run(1 if is_alone else len(inputs)))
            except Exception as error:
                raise Refusal(gpu_kernels.say_reference(device, error)) from error
        for tokens in (1, len(inputs)):
            key = ("experts", *self._forms[device], dtype, width, tokens)
            if reason := gpu_kernels.difference(key, device, partial(run, tokens), partial(reference, tokens)):
                raise Refusal(reason)


def _reference(rows: torch.Tensor, matrices: list[Matrix]) -> torch.Tensor:
    w1, w3, w2 = matrices
    return reference_linear(F.silu(reference_linear(rows, *w1)) * reference_linear(rows, *w3), *w2)


def _form(number: int, matrices: list[Matrix]) -> tuple[int, torch.dtype, torch.dtype]:
    """The intermediate size, and the dtypes of an expert's weights and scales."""
    (w1, _), (w3, _), (w2, _) = matrices
    dtypes = {(weight.dtype, weight.dtype if scale is None else scale.dtype) for weight, scale in matrices}
    if len(dtypes) != 1 or not w1.shape == w3.shape == w2.shape[::-1]:
        raise Refusal(f"the matrices of expert {number} differ in size or dtype")
    return (w1.shape[0], *dtypes.pop())


def matrix(name: str, linear: Any) -> Matrix:
    """The weight of a linear layer, and its scale if it has one.

    Raises:
        Refusal: the kernels cannot compute with it.
    """
    scale = None
    is_ours = is_plain(linear) or isinstance(linear, SkyworkQuantizedLinear)
    if is_ours and linear._parameters.get("weight") is None:
        raise Refusal(f"{name} has no weight of its own")
    if is_plain(linear) and linear.weight.dtype in KERNEL_INPUTS:
        weight: torch.Tensor = linear.weight
    elif isinstance(linear, SkyworkQuantizedLinear):
        weight, scale = linear.codes, linear.weight_scale
        scales = len(weight) if weight.dtype == torch.int8 else 1
        if scale.numel() != scales or scale.dtype not in SCALES or not scale.is_contiguous():
            raise Refusal(f"{name} has other scales than {scales} of a float dtype")
    else:
        raise Refusal(f"{name} is a {type(linear).__name__} that the kernels do not know")
    if linear.bias is not None:
        raise Refusal(f"{name} has a bias")
    if isinstance(weight, DTensor) or not weight.data_ptr():
        raise Refusal(f"{name} is spread over processes")
    if not weight.is_contiguous() or weight.numel() > _MAX_ELEMENTS:
        raise Refusal(f"{name} is not in one piece, or has more than {_MAX_ELEMENTS:,} elements")
    return weight, scale


def is_cast(tensor: torch.Tensor) -> bool:
    """Whether autocast would compute this in another dtype."""
    kind = tensor.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return is_on and torch.get_autocast_dtype(kind) != tensor.dtype
