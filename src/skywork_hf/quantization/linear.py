"""The linear layers that hold quantised weights, and 16-bit ones on a CPU. They are `nn.Linear`s, so adapters and
device maps find them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from . import formats, matmul

# What may be done with codes: to look at their form, to move and compare them. Everything else computes, or begins to:
# a merge of PEFT with `safe_merge=True` clones first.
_HARMLESS = re.compile(
    r"__(format|get|getitem|hash|len|repr)__|is_\w+|(empty|ones|zeros)_like|requires_grad_?|contiguous|cpu|cuda|"
    r"data_ptr|detach|dim|element_size|equal|get_device|nelement|numel|pin_memory|reshape|size|storage_offset|stride|t|to|"
    r"transpose|untyped_storage|view"
)


class Codes(torch.Tensor):
    """What `SkyworkQuantizedLinear.weight` gives: codes that nothing computes with, as they are not the real values.

    PEFT's methods that read a layer's weight, or merge into it, fail with a ValueError that names `path`, the layer's.
    """

    _is_param = True  # to torch, a parameter as any other
    path: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        codes = next((value for value in values if isinstance(value, Codes)), None)
        # An attribute is set by a function that is called `__set__` and belongs to what has the attribute's name.
        name = func.__self__.__name__ if func.__name__ == "__set__" else func.__name__
        if codes is not None and _HARMLESS.fullmatch(name):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            if name != "to" or result.dtype == codes.dtype:
                return _as_codes(result, codes.path) if not name.endswith("_like") else result
        raise ValueError(
            f"`{getattr(codes, 'path', 'linear')}.weight` is quantised, and `{name}` would take its codes for real "
            "values: load the base model in 16 bit (a model in memory: call its `dequantize()`), or take LoRA, which "
            "adapts quantised weights, and merge on disk with `skywork-hf convert --adapter`."
        )


def _as_codes(value: Any, path: str) -> Any:
    if type(value) not in (torch.Tensor, nn.Parameter):
        return value  # no tensor, or one that lives elsewhere than in memory of its own
    codes: Any = value.as_subclass(Codes)
    codes.path = path
    return codes


class _Parameters(dict[str, Any]):
    """The parameters of a layer: itself without `Codes`, which accelerate takes from the layer, moves and sets."""

    def __setitem__(self, name: str, value: Any) -> None:
        plain = nn.Parameter(value.as_subclass(torch.Tensor), requires_grad=False) if type(value) is Codes else value
        super().__setitem__(name, plain)


class _FrozenMatmul(torch.autograd.Function):
    """A matmul on a weight that is never trained: a gradient for its inputs only, by the weight's real values,
    whatever the kernel rounded on the way (a straight-through estimate)."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: SkyworkQuantizedLinear) -> torch.Tensor:
        ctx.save_for_backward(layer.codes, layer.weight_scale)
        return layer.matmul(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight, scale = ctx.saved_tensors
        return matmul.dequantized_backward(grads[0], weight, scale), None


class SkyworkQuantizedLinear(nn.Linear):
    """A linear layer with a frozen quantised `weight` [out_features, in_features] and its `weight_scale`."""

    weight_scale: nn.Parameter
    input_scale: nn.Parameter | None
    # In what dtype PEFT is to make adapters: its own. Without this it takes the weight's, and rounds them to float8.
    compute_dtype: torch.dtype | None = None
    # Whether the Triton kernels compute it; see `find_kernels`.
    has_triton = False
    path = "linear"  # its name in the model that it was loaded with
    # In tensor parallelism, transformers calls it with this process's part of the weight alone.
    _hf_quantized_needs_local_tp = True

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: Any) -> None:
        nn.Module.__init__(self)  # past nn.Linear's own, which would make a float weight
        self.__dict__["_parameters"] = _Parameters()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _frozen((out_features, in_features), dtype, device)
        self.register_parameter("bias", _frozen((out_features,), None, device) if bias else None)

    def __getattr__(self, name: str) -> Any:
        """`weight` as `Codes`: whoever computes with it means the real values."""
        parameters = self.__dict__.get("_parameters", {})
        if name not in parameters:
            return super().__getattr__(name)
        return _as_codes(parameters[name], self.path) if name == "weight" else parameters[name]

    @property
    def codes(self) -> torch.Tensor:
        """The parameter `weight`, to compute with."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def matmul(self, inputs: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] to [rows, out_features], same dtype."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], same dtype; under autocast its dtype, as of any linear.

        Raises:
            ValueError: the weight, which gets no gradient, is to be trained, as PEFT's `modules_to_save` has it.
        """
        parameters = self._parameters  # as attributes they cost a microsecond each
        if parameters["weight"].requires_grad and torch.is_grad_enabled():  # type: ignore[union-attr]
            raise ValueError(
                f"`{self.path}.weight` is quantised, and would stay as it is however long it is trained: leave it out "
                "of `modules_to_save` and of `requires_grad_`, or load the model in 16 bit."
            )
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # kernels choose what each of their matmuls runs in
                return self.forward(input.to(torch.get_autocast_dtype(device)))
        rows = (
            input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        )  # of which a process has a part in tensor parallelism
        # Past autograd where nothing is trained: a decoded token meets some hundreds of these.
        trained = torch.is_grad_enabled() and rows.requires_grad
        outputs = _FrozenMatmul.apply(rows, self) if trained else self.matmul(rows)
        bias = parameters["bias"]
        outputs = outputs if bias is None else outputs + bias.to(outputs.dtype)
        return outputs if input.dim() == 2 else outputs.view(*input.shape[:-1], outputs.shape[-1])

    @property
    def W_q(self) -> torch.Tensor:
        """The weight, by HQQ's name: where PEFT finds that, it asks `dequantize` for the real values, as for DoRA."""
        return self.weight

    @overload
    def dequantize(self) -> torch.Tensor: ...
    @overload
    def dequantize(self, dtype: torch.dtype) -> nn.Linear: ...

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear | torch.Tensor:
        """An ordinary linear layer with the same real values in `dtype`; without one, these alone, float32
        [out_features, in_features]."""
        if dtype is None:
            return formats.dequantize(self.codes, self.weight_scale, torch.float32)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(formats.dequantize(self.codes, self.weight_scale, dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SkyworkQuantizedLinear:
        """Move, but never cast: a float8 weight in another dtype would be another weight."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        self.find_kernels()
        return self

    def find_kernels(self) -> None:
        """Note whether the Triton kernels run where the weight is; not asked in each forward."""
        self.has_triton = matmul.has_kernels_for(self.codes, self.weight_scale)


class SkyworkFp8Linear(SkyworkQuantizedLinear):
    """FP8: `weight` float8_e4m3fn, `weight_scale` and, with static activations, `input_scale` float32 of one element
    (Skywork-MoE-Base-FP8 calls the latter `act_scale`). real = fp8 * scale."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation_scheme: str = "dynamic",
        scale_shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
        device: Any = None,
    ) -> None:
        """`scale_shapes` are those of `weight_scale` and `input_scale`: () or (1,)."""
        super().__init__(in_features, out_features, bias, formats.FP8, device)
        self.activation_scheme = activation_scheme
        weight_scale, input_scale = (_frozen(shape, torch.float32, device) for shape in scale_shapes)
        self.weight_scale = weight_scale
        self.register_parameter("input_scale", input_scale if activation_scheme == "static" else None)

    def matmul(self, inputs: torch.Tensor) -> torch.Tensor:
        scheme, has_triton = self.activation_scheme, self.has_triton and not inputs.is_cpu
        return matmul.fp8_linear(inputs, self.codes, self.weight_scale, scheme, self.input_scale, has_triton)


class SkyworkInt8Linear(SkyworkQuantizedLinear):
    """int8: `weight` int8, `weight_scale` bfloat16 [out_features]. real = int8 * scale, row by row."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        quantize_activations: bool = True,
        device: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, torch.int8, device)
        self.quantize_activations = quantize_activations
        self.weight_scale = _frozen((out_features,), torch.bfloat16, device)

    def matmul(self, inputs: torch.Tensor) -> torch.Tensor:
        parameters: Any = self._parameters
        weight, scale, has_triton = (
            parameters["weight"],
            parameters["weight_scale"],
            self.has_triton and not inputs.is_cpu,
        )
        return matmul.int8_linear(inputs, weight, scale, self.quantize_activations, has_triton)


class SkyworkLinear(nn.Linear):
    """An ordinary linear layer, which on a CPU and in bfloat16 runs few rows, without gradients, by the CPU kernels.
    Wherever else it is moved, and whatever is done with it, it is `nn.Linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        # Past `__getattr__`, and with no view where none is needed: a decoded token meets some hundreds of these.
        weight: Any = self._parameters.get("weight")
        bias, width = self._parameters.get("bias"), input.shape[-1]
        rows = input.numel() // width if width else 0
        is_plain = is_on_cpu(input) and is_on_cpu(weight) and weight.dtype == input.dtype == torch.bfloat16
        if not is_plain or runs_elsewhere() or matmul.linear_kernel("cpu", input.dtype, rows) != "numba":
            return super().forward(input)
        outputs = matmul.bfloat16_linear(input if input.dim() == 2 else input.reshape(rows, width), weight)
        if input.dim() != 2:
            outputs = outputs.view(*input.shape[:-1], outputs.shape[-1])
        return outputs if bias is None else outputs + bias


def is_plain(module: Any) -> bool:
    """Whether a module is a linear layer that is neither quantised nor anything else."""
    return type(module) in (nn.Linear, SkyworkLinear)


def is_on_cpu(tensor: Any) -> bool:
    """Whether a tensor's values lie in this process's memory, one after the other."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()


def runs_elsewhere() -> bool:
    """Whether a forward pass is one that only torch's own operations will do for."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _frozen(shape: tuple[int, ...], dtype: torch.dtype | None, device: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
