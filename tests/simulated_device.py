"""Simulated accelerators, so that a machine without a GPU can test models spread over several devices.

    with SimulatedDevices() as simulated:
        model = AutoModelForCausalLM.from_pretrained(path, device_map={"model": "lazy:0", "lm_head": "lazy:1"})
        model(ids.to("lazy:0"))
        simulated.copies, simulated.host_syncs, simulated.elapsed

Every tensor on "lazy:<index>" is a `SimulatedTensor` around a CPU tensor that does the work. Mixing devices in an
operation raises as torch does. "lazy" is a device type that torch knows by name and has no backend for, that no
library special-cases, and of the few such types the one on which autograd runs: in the thread that calls `backward`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import accelerate.utils.offload
import safetensors
import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE_TYPE = "lazy"
CPU = torch.device("cpu")
COPY, TO_COPY = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class Copy(NamedTuple):
    """One copy between two devices; the CPU is one of them or neither."""

    source: torch.device
    target: torch.device
    nbytes: int
    non_blocking: bool


class SimulatedTensor(torch.Tensor):
    """Says that it lives on a simulated device; `inner` holds its values on the CPU, in the same strides."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inner: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate re-makes a parameter as `type(parameter)(value, requires_grad=...)`
            return torch.nn.Parameter(inner, requires_grad)
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=device)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a simulated device, outside `with SimulatedDevices()` or in another thread")

    # What accelerate and safetensors tell shared weights by.
    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.cpu().tolist()

    # With these two, `module.to` swaps whole tensors; it would otherwise swap their metadata and leave `inner`.
    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["inner"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict, device: torch.device, size: Any, stride: Any) -> SimulatedTensor:
        return SimulatedTensor(inner["inner"], device)

    def __repr__(self, **_: Any) -> str:
        return f"SimulatedTensor({self.inner}, device='{self.device}')"


class SimulatedDevices(TorchDispatchMode):
    """Runs every operation of this thread, those on simulated devices on the tensors inside.

    Attributes:
        copies: the copies between devices, simulated or CPU, in order; those to "meta" copy nothing.
        host_syncs: how often the host waited for a result of a simulated device: a blocking copy to the CPU, `item`,
            `nonzero`, a mask as index, `equal`, `synchronize`. A real blocking copy to a device makes the host wait
            too; those are counted only in `copies`.
        elapsed: when the last device, or the host, was done with what it was given. The unit is a byte: an operation
            takes as long as all that it reads is large, and so does a copy. No clock is read.

    Each device has one stream, as CUDA's current one: it does one thing after the other, and begins when the host has
    asked for it. The host goes on at once, but for its own operations, those on the CPU, and for waits. A copy between
    two devices begins when both are free, and occupies both.

    A non-blocking copy to the CPU arrives when the host next waits for the copy's source. Until then an operation on
    its storage raises, except views and further copies from a device into it, and what reads memory with no operation
    (`tolist`, `numpy`) finds wrong values everywhere: NaN, or each integer's bitwise complement.
    """

    def __init__(self) -> None:
        super().__init__()
        self._adaptations: list[ExitStack] = []
        self._pending: list[tuple[torch.device, torch.Tensor, torch.Tensor]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted; what has not yet arrived still arrives."""
        self.copies: list[Copy] = []
        self.host_syncs = 0
        self._done: dict[torch.device, float] = {CPU: 0}  # the CPU's is the host's

    @property
    def elapsed(self) -> float:
        return max(self._done.values())

    def _occupy(self, nbytes: float, *devices: torch.device) -> None:
        """Let devices do one thing of so many bytes, all together."""
        ends = max(self._done.get(device, 0) for device in (CPU, *devices)) + nbytes
        self._done |= dict.fromkeys(devices, ends)

    def __enter__(self) -> SimulatedDevices:
        self._adaptations.append(_adapted_libraries())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._adaptations.pop().close()

    def synchronize(self, device: torch.device | str | None = None) -> None:
        """The host waits for `device`, or for all: one wait, after which all that was copied from there is there."""
        self.host_syncs += 1
        device = torch.device(device) if device is not None else None
        arriving = [entry for entry in self._pending if device in (None, entry[0])]
        self._pending = [entry for entry in self._pending if device not in (None, entry[0])]
        with no_dispatch():  # it takes no time of its own
            for _, target, values in arriving:
                target.copy_(values)
        waited_for = self._done.values() if device is None else [self._done.get(device, 0)]
        self._done[CPU] = max(self._done[CPU], *waited_for)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode, torch leaves taking these apart to us
                return func.decompose(*args, **kwargs)
        self._refuse_pending(func, _leaves(torch.Tensor, args, kwargs))
        if func in (COPY, TO_COPY):
            return self._copy(func, *args, **kwargs)
        waits = _makes_host_wait(func, args, kwargs)
        if func in INDEXING and isinstance(args[0], SimulatedTensor):
            args = (args[0], [self._beside(args[0], index) for index in args[1]], *args[2:])
        tensors = _leaves(torch.Tensor, args, kwargs)
        device = _common_device(func, tensors)
        if not func.is_view and all(tensor.device.type != "meta" for tensor in tensors):
            self._occupy(sum(tensor.nbytes for tensor in tensors), device or CPU)
        if waits and device is not None:
            self.synchronize(device)
        return _run(func, args, kwargs, device)

    def _refuse_pending(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """A program must not touch what a device has yet to deliver, except to say where more shall go."""
        if not self._pending or func.is_view:
            return
        if func is COPY and isinstance(tensors[1], SimulatedTensor):
            tensors = tensors[1:]
        pending = {target.untyped_storage().data_ptr() for _, target, _ in self._pending}
        if any(tensor.untyped_storage().data_ptr() in pending for tensor in tensors):
            raise RuntimeError(f"{func} touches a non-blocking copy to the CPU before the host has waited for it")

    def _copy(self, func: Any, first: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        """`copy_(target, source, non_blocking)` and `_to_copy(source)`: all that moves values between devices."""
        source = rest[0] if func is COPY else first
        non_blocking = options.pop("non_blocking", rest[1] if len(rest) > 1 else False)
        if func is COPY:
            target, values = first, COPY(_inner(first), _inner(source))
        else:
            device = options.pop("device", None) or source.device
            values = TO_COPY(_inner(source), device=CPU if _is_simulated(device) else device, **options)
            target = SimulatedTensor(values, device) if _is_simulated(device) else values
        if target.device.type == "meta" or not values.numel():
            return target
        if source.device == target.device:
            self._occupy(source.nbytes, source.device)
        else:
            self._record(source.device, target.device, values, non_blocking)
        return target

    def _record(self, source: torch.device, target: torch.device, values: torch.Tensor, non_blocking: bool) -> None:
        copy = Copy(source, target, values.numel() * values.element_size(), non_blocking)
        self.copies.append(copy)
        # A real device copies from and to the CPU's memory by itself; the host is there only where it waits.
        self._occupy(copy.nbytes, *{source, target} - ({CPU} if non_blocking else set()))
        if target != CPU:
            return
        if not non_blocking:
            return self.synchronize(source)
        self._pending.append((source, values, values.clone()))
        values.fill_(torch.nan) if values.is_floating_point() else values.bitwise_not_()

    def _beside(self, tensor: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor | None:
        """torch itself moves an index from the CPU to the tensor that is indexed."""
        return index if index is None or index.device != CPU else self._copy(TO_COPY, index, device=tensor.device)


def _adapted_libraries() -> ExitStack:
    """What the libraries need to work in this thread, which alone is in the mode, and on a device type they ignore.

    Autocast raises when asked whether it is on for "lazy"; safetensors cannot read to it, but accelerate then copies
    what was read to the CPU. `torch.tensor(..., device=...)` has to make its tensor on the CPU and copy that.
    """
    asked, opened = torch.is_autocast_enabled, safetensors.safe_open
    replacements = (
        (torch, "is_autocast_enabled", lambda *types: types != (DEVICE_TYPE,) and asked(*types)),
        (accelerate.utils.offload, "safe_open", lambda file, framework, device: opened(file, framework)),
    )
    adapted = ExitStack()
    for module, name, replacement in replacements:
        adapted.enter_context(patch.object(module, name, replacement))
    adapted.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
    torch._C._set_only_lift_cpu_tensors(True)
    adapted.enter_context(patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
    return adapted


def _leaves(kind: type, *trees: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, kind)]


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inner if isinstance(tensor, SimulatedTensor) else tensor


def _is_simulated(device: torch.device | None) -> bool:
    return device is not None and device.type == DEVICE_TYPE


def _common_device(func: Any, tensors: list[torch.Tensor]) -> torch.device | None:
    """The simulated device of an operation's tensors, None without one; as in torch, CPU scalars go anywhere."""
    devices = {tensor.device for tensor in tensors if isinstance(tensor, SimulatedTensor)}
    others = {tensor.device for tensor in tensors if tensor.dim() > 0} - devices
    if devices and len(devices | others) > 1:
        found = ", ".join(sorted(map(str, devices | others)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {found}")
    return next(iter(devices), None)


def _makes_host_wait(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host needs values of an operation's tensors: what it returns, or the shape of that, depends on them.

    A mask as index does; but filling where it holds, `x[mask] = 0.0`, needs no shape.
    """
    if func in INDEXING:
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in _leaves(SimulatedTensor, args[1]))
        return masked and (func is INDEXING[0] or args[2].dim() > 0)
    if func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return False
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _run(func: Any, args: Any, kwargs: Any, device: torch.device | None) -> Any:
    """Runs an operation on the CPU. What it returns is on `device`, or on the one that the operation is asked for."""
    if kwargs.get("device") is not None:
        device = kwargs["device"]
        kwargs = {**kwargs, "device": CPU if _is_simulated(device) else device}
    inner_args, inner_kwargs = tree_map_only(SimulatedTensor, _inner, (args, kwargs))
    outputs = func(*inner_args, **inner_kwargs)
    if not _is_simulated(device):
        return outputs
    if torch.Tag.inplace_view in func.tags:  # what `inner` now looks like, its wrapper shall too
        with no_dispatch(), torch._C._PreserveDispatchKeyGuard():
            torch._C._set_meta_in_tls_dispatch_include(True)  # "lazy" has no kernels, "meta" those for metadata
            func(*args, **kwargs)
    written = {id(tensor.inner): tensor for tensor in _leaves(SimulatedTensor, args, kwargs)}
    scalars = {id(tensor) for tensor in _leaves(torch.Tensor, args, kwargs) if tensor.device == CPU}

    def wrap(output: torch.Tensor) -> torch.Tensor:
        tensor = written.get(id(output))
        if id(output) in scalars:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} writes {device} to the CPU")
        if tensor is not None and (tensor.shape, tensor.stride()) != (output.shape, output.stride()):
            raise NotImplementedError(f"{func} changes the shape of a simulated tensor in place")
        return SimulatedTensor(output, device) if tensor is None else tensor

    return tree_map_only(torch.Tensor, wrap, outputs)
