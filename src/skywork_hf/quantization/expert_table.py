"""Where the experts of one device are, for kernels that read on that device which of them were chosen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from . import triton_blocks, triton_kernels
from .gpu_kernels import difference
from .linear import SkyworkQuantizedLinear, is_plain
from .triton_programs import TABLE_COLUMNS

MATRICES = ("w1", "w3", "w2")
INPUTS = (torch.bfloat16, torch.float16)
SCALES = (torch.bfloat16, torch.float16, torch.float32)
# As places in a weight are counted in 32 bits.
_MAX_ELEMENTS = 2**31 - 1


# A weight, and its scale if it has one.
Matrix = tuple[torch.Tensor, torch.Tensor | None]


class Refusal(Exception):
    """Why the kernels cannot compute something, in a sentence."""


class ExpertTable:
    """The addresses of the weights of those experts that are on a device.

    It is made when a model is placed. `takes` looks whether a module or a weight was replaced or moved since, or has
    got a hook, and reads all again; not while a forward is compiled, whose guards see new modules and tensors, but not
    other memory behind the same tensor.

    Args:
        experts: all experts of a layer, with the names and the meaning of `SkyworkMoeExpert`'s parts.
        device: whose they are; those on others count as absent.

    Attributes:
        refusal: why the kernels do not run, in a sentence; None if they do.
    """

    refusal: str | None

    def __init__(self, experts: Iterable[nn.Module], device: torch.device) -> None:
        self.experts, self.device = list(experts), device
        self._read()

    def takes(self, hidden_states: torch.Tensor) -> bool:
        """Whether a call computes this: a few tokens in 16 bit, in inference, by experts that the kernels know."""
        is_few = 0 < len(hidden_states) <= triton_kernels.MAX_TOKENS
        if not is_few or torch.is_grad_enabled() or hidden_states.device != self.device or _is_cast(hidden_states):
            return False
        if not torch.compiler.is_compiling() and not self._is_as_read():
            self._read()
        return self.refusal is None and hidden_states.dtype in self._inputs

    def __call__(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        is_partial: bool = False,
    ) -> torch.Tensor:
        """The weighted sum of the outputs of the chosen experts that are here; see `triton_kernels.experts`."""
        facts = self._facts
        return triton_kernels.experts(hidden_states, top_k_index, top_k_weights, self.addresses, *facts, is_partial)

    @torch.no_grad()
    def prepare(self, top_k: int) -> None:
        """Choose block sizes on this device and compare with the experts' own forward, if neither was done yet for
        experts of this form: while a model is placed, as both take time. Where they differ, `refusal` says so."""
        if self.refusal is not None:
            return
        here = [number for number, row in enumerate(self.addresses.tolist()) if row[0]][:top_k]
        hidden_size, dtype = self._linears[-1].out_features, self._inputs[0]
        places = torch.arange(triton_kernels.MAX_TOKENS * hidden_size, device=self.device)
        inputs = places.sin().to(dtype).view(-1, hidden_size)
        index = torch.tensor(here, device=self.device).expand(len(inputs), -1)
        weights = torch.full(index.shape, 1 / len(here), device=self.device)

        def run(tokens: int) -> torch.Tensor:
            return self(inputs[:tokens], index[:tokens], weights[:tokens])

        if self.device.type == "cuda":
            triton_blocks.tune(self.device, lambda is_alone: run(1 if is_alone else len(inputs)))
        for tokens in (1, len(inputs)):

            def reference(rows: torch.Tensor = inputs[:tokens]) -> torch.Tensor:
                return torch.stack([self.experts[number](rows).float() for number in here]).mean(dim=0)

            key = ("experts", *self._facts, dtype, hidden_size, tokens)
            self.refusal = self.refusal or difference(key, self.device, partial(run, tokens), reference)

    def _read(self) -> None:
        """Note where everything is, and refuse what the kernels cannot do."""
        self._places = [(expert._modules, name) for expert in self.experts for name in MATRICES]
        self._linears: list[Any] = [modules.get(name) for modules, name in self._places]
        self._parameters = [
            (linear._parameters, name)
            for linear in self._linears
            for name in ("weight", "weight_scale")
            if linear is not None and linear._parameters.get(name) is not None
        ]
        self._pointers = self._pointers_now()
        modules = [module for module in (*self.experts, *self._linears) if module is not None]
        self._hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._attributes = [module.__dict__ for module in modules]
        self._is_hooked = self._is_hooked_now()
        self.refusal = None
        try:
            self._fill()
        except Refusal as refusal:
            self.refusal = str(refusal)

    def _is_as_read(self) -> bool:
        # Each decoded token comes here once a layer.
        linears = [modules.get(name) for modules, name in self._places]
        return (
            linears == self._linears
            and self._pointers_now() == self._pointers
            and self._is_hooked_now() == self._is_hooked
        )

    def _pointers_now(self) -> list[int]:
        return [parameters[name].data_ptr() for parameters, name in self._parameters]

    def _is_hooked_now(self) -> bool:
        """Whether a module does more than its class says: by hooks of torch, or accelerate's forwards."""
        return any(self._hooks) or any(map(contains, self._attributes, repeat("forward")))

    def _fill(self) -> None:
        if self._is_hooked:
            raise Refusal("an expert has a hook, which the kernels would pass over")
        rows, forms = [], set()
        for number, expert in enumerate(self.experts):
            matrices = [matrix(f"w{name[1]} of expert {number}", expert._modules.get(name)) for name in MATRICES]
            if any(weight.device != self.device for weight, _ in matrices):
                rows.append([0] * TABLE_COLUMNS)
                continue
            if type(expert.act_fn) is not type(ACT2FN["silu"]):
                raise Refusal(f"expert {number} has another activation than silu")
            rows.append([0 if tensor is None else tensor.data_ptr() for pair in matrices for tensor in pair])
            forms |= {_form(number, matrices)}
        if len(forms) != 1:
            raise Refusal("the experts of a device differ in size or dtype" if forms else "no expert is there")
        ((intermediate_size, weight_dtype, scale_dtype),) = forms
        is_aligned = not any(address % 16 for row in rows for address in row[::2])
        self._facts = (intermediate_size, weight_dtype, scale_dtype, is_aligned)
        self._inputs = (weight_dtype,) if weight_dtype in INPUTS else INPUTS
        self.addresses = torch.tensor(rows).to(self.device)


def _form(
    number: int, matrices: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> tuple[int, torch.dtype, torch.dtype]:
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
    if is_plain(linear) and linear.weight.dtype in INPUTS:
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
    if not weight.is_contiguous() or weight.numel() > _MAX_ELEMENTS:
        raise Refusal(f"{name} is not in one piece, or has more than {_MAX_ELEMENTS:,} elements")
    return weight, scale


def _is_cast(tensor: torch.Tensor) -> bool:
    """Whether autocast would compute this in another dtype."""
    kind = tensor.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return is_on and torch.get_autocast_dtype(kind) != tensor.dtype
