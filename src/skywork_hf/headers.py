"""What checkpoint files hold, from their headers alone: names, dtypes and shapes, before a byte of weights is read."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# The names that safetensors gives dtypes (its format specification), for those that torch can hold one by one.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# What an unquantised checkpoint's weights may be stored in.
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEADER_LIMIT = 100_000_000  # safetensors' own


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file.

    Args:
        file: the file that holds it.
        name: its name in the file.
        dtype: what it is stored in.
        shape: its shape.
        offset: where its bytes begin in a safetensors file.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"`{self.name}` in {self.file}"


def read_headers(files: list[Path] | list[str]) -> dict[str, StoredTensor]:
    """The tensors of checkpoint files, by name.

    Safetensors headers are read as they are; pickles are opened memory-mapped with `weights_only=True`.

    Raises:
        ValueError: a file is cut off or is not what its name says, holds something else than tensors, a dtype that
            torch cannot hold, or a tensor that another file has too.
    """
    stored: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        for tensor in _safetensors_header(file) if file.suffix == ".safetensors" else _pickle_header(file):
            if tensor.name in stored:
                raise ValueError(
                    f"{tensor} is in {stored[tensor.name].file} too: expected one source for each tensor."
                )
            stored[tensor.name] = tensor
    return stored


def _safetensors_header(file: Path) -> list[StoredTensor]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): download or write it again.") from error
    if size != 8 + length + end:
        raise ValueError(
            f"{file} has {size:,} bytes and its header speaks of {8 + length + end:,}: it is cut off or damaged; "
            "download or write it again."
        )
    data = 8 + length
    return [
        StoredTensor(file, name, _dtype(file, name, entry), tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def _dtype(file: Path, name: str, entry: dict[str, Any]) -> torch.dtype:
    try:
        return SAFETENSORS_DTYPES[entry["dtype"]]
    except KeyError:
        raise ValueError(
            f"`{name}` in {file} is stored as {entry['dtype']}, which torch cannot hold; expected one of "
            f"{', '.join(SAFETENSORS_DTYPES)}."
        ) from None


def _pickle_header(file: Path) -> list[StoredTensor]:
    try:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as a checkpoint: {str(error).splitlines()[0]} Pickles that hold anything but "
            "plain tensors are refused."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} holds something else than named tensors.")
    return [StoredTensor(file, name, value.dtype, tuple(value.shape)) for name, value in content.items()]


def read_tensors(tensors: list[StoredTensor]) -> dict[str, torch.Tensor]:
    """The values of these tensors, by name, on the CPU; memory-mapped where the file allows it."""
    values: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        names = [tensor.name for tensor in tensors if tensor.file == file]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                values |= {name: opened.get_tensor(name) for name in names}
        else:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            values |= {name: content[name] for name in names}
    return values


def refuse_quantized(stored: dict[str, StoredTensor]) -> None:
    """Check the tensors of a checkpoint whose config says nothing of quantisation.

    Raises:
        ValueError: one is stored as float8 or in 8-bit integers, so it would be read without its scale.
    """
    for tensor in stored.values():
        if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:
            raise ValueError(
                f"{tensor} is stored as {tensor.dtype}, and config.json has no `quantization_config` that says how to "
                'read it. A released FP8 checkpoint has "quantization_config": {"quant_method": "fp8", '
                '"activation_scheme": "static"} there (or "dynamic"); take config.json from where the weights came '
                "from."
            )
