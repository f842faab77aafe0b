"""Values of stored tensors, read one after the other."""

from __future__ import annotations

import mmap
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PosixPath
from signal import Signals
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from .headers import StoredTensor, open_pickle

# numpy's own way to pickle an array; older ones name it otherwise.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
# Enums of Megatron-LM, by the names that its versions have for them.
_ENUMS = (
    "megatron.core.enums.ModelType",
    "megatron.model.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
)


@dataclass(frozen=True)
class EnumMember:
    """Stands for a member of any enum of Megatron-LM, so that reading its pickles does not import it."""

    value: Any


# In training checkpoints' pickles: the arguments of the run, which may hold enums and paths, the states of random
# number generators, which are arrays, and buffers of bytes. Everything else that is no tensor is refused.
MEGATRON_GLOBALS: list[Any] = [
    Namespace,
    SimpleNamespace,
    PosixPath,
    Signals,
    BytesIO,
    np.ndarray,
    np.dtype,
    type(np.dtype("uint32")),
    _RECONSTRUCT,
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    *((EnumMember, name) for name in _ENUMS),
]
_OPEN_FILES = 4
_DEEPEST = 32  # a dictionary may hold itself


class Reader:
    """Reads tensors from checkpoint files; values are mapped where a file allows it.

    Of a safetensors file only the tensor is mapped, so that address space may be as short as memory. Of pickles some
    stay open, as many as are read together. Values in nested dicts, as Megatron's pickles have them, are named by the
    dicts' keys joined with "/".
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, dict[str, torch.Tensor]] = OrderedDict()

    def read(self, tensors: Sequence[StoredTensor]) -> list[torch.Tensor]:
        """The values of tensors that something is made of together."""
        room = max(_OPEN_FILES, len({tensor.file for tensor in tensors}))
        return [
            self._content(tensor.file, room)[tensor.name] if tensor.offset is None else _mapped(tensor)
            for tensor in tensors
        ]

    def _content(self, file: Path, room: int) -> dict[str, torch.Tensor]:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        while len(self._open) >= room:
            self._open.popitem(last=False)
        self._open[file] = dict(flat_tensors(load_pickle(file)))
        return self._open[file]


def _mapped(tensor: StoredTensor) -> torch.Tensor:
    if tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    offset = tensor.offset or 0
    if tensor.nbytes < mmap.PAGESIZE:  # as the thousands of scales are: reading is several times as fast
        data = np.fromfile(tensor.file, dtype=np.uint8, count=tensor.nbytes, offset=offset)
    else:
        # Copy on write, so that torch may have it; nobody writes.
        data = np.memmap(tensor.file, dtype=np.uint8, mode="c", offset=offset, shape=(tensor.nbytes,))
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)


def load_pickle(file: Path) -> Any:
    """A pickle's content, mapped where it can be, tensors and plain values only.

    Raises:
        ValueError: it holds anything else, cannot be read, or is damaged.
    """
    with torch.serialization.safe_globals(MEGATRON_GLOBALS):
        return open_pickle(file)


def flat_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts, with their keys joined by "/".

    Raises:
        ValueError: they are nested without an end.
    """
    if prefix.count("/") > _DEEPEST:
        raise ValueError(f"Tensors are nested in more than {_DEEPEST} dictionaries, below {prefix[:40]!r}.")
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from flat_tensors(value, f"{prefix}{key}/")
