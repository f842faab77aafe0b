"""Values of stored tensors, read one after the other."""

from __future__ import annotations

import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..headers import StoredTensor

# Of training checkpoints' pickles: the arguments of the run. Everything else that is no tensor is refused.
MEGATRON_GLOBALS: list[Any] = [Namespace]
_OPEN_FILES = 4


class Reader:
    """Reads tensors from checkpoint files, keeping some files open; values are mapped where a file allows it.

    Values in nested dicts, as Megatron's pickles have them, are named by the dicts' keys joined with "/".
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        content = self._content(tensor.file)
        return content[tensor.name] if isinstance(content, dict) else content.get_tensor(tensor.name)

    def _content(self, file: Path) -> Any:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        while len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)
        if file.suffix == ".safetensors":
            self._open[file] = safe_open(file, framework="pt")
        else:
            self._open[file] = dict(flat_tensors(load_pickle(file)))
        return self._open[file]


def load_pickle(file: Path, device: str = "cpu") -> Any:
    """A pickle's content, mapped where it can be, tensors and plain values only.

    Args:
        device: "meta" reads no values.

    Raises:
        ValueError: it holds anything else, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals(MEGATRON_GLOBALS):
            return torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as a checkpoint: {str(error).splitlines()[0]} Pickles that hold anything but "
            "tensors and plain values are refused."
        ) from error


def flat_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts, with their keys joined by "/"."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from flat_tensors(value, f"{prefix}{key}/")
