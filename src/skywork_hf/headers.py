"""What checkpoint files hold, from their headers alone: names, dtypes and shapes, before a byte of weights is read."""

from __future__ import annotations

import math
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from .untrusted import check_file, parse_json

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
_MOST_DIMENSIONS = 64  # torch's own
# Where training programs put a model's tensors among other things.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


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
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"`{self.name}` in {self.file}"


def read_headers(files: list[Path] | list[str]) -> dict[str, StoredTensor]:
    """The tensors of checkpoint files, by name.

    Safetensors headers are read as they are; pickles are opened memory-mapped with `weights_only=True`.

    Raises:
        ValueError: a file is none, cut off or not what its name says, holds something else than tensors, a dtype that
            torch cannot hold, a name that cannot be printed, or a tensor that another file has too.
    """
    stored: dict[str, StoredTensor] = {}
    for file in map(check_file, map(Path, files)):
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
            header = parse_json(stream.read(length))
        header.pop("__metadata__", None)
        places = {name: _place(name, entry) for name, entry in header.items()}
        end = 8 + length + max((place[1] for place in places.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): download or write it again.") from error
    if size != end:
        raise ValueError(
            f"{file} has {size:,} bytes and its header speaks of {end:,}: it is cut off or damaged; download or write "
            "it again."
        )
    tensors = [_tensor(file, name, entry, 8 + length + places[name][0]) for name, entry in header.items()]
    _check_offsets(tensors, header)
    return tensors


def _place(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, after the header."""
    begin, end = entry["data_offsets"]
    if not (_is_size(begin) and _is_size(end)):
        raise ValueError(f"{name!r} has `data_offsets` {entry['data_offsets']!r}, expected two integers")
    return begin, end


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _check_name(file: Path, name: str) -> None:
    if not name.isprintable():
        raise ValueError(f"{file} holds a tensor called {name!r}: expected a name that can be printed.")


def _check_offsets(tensors: list[StoredTensor], header: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the tensors do not follow each other, each with the bytes that its dtype and shape make.
    """
    begin = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        expected = [begin, begin + tensor.nbytes]
        if header[tensor.name]["data_offsets"] != expected:
            raise ValueError(
                f"{tensor} has `data_offsets` {header[tensor.name]['data_offsets']}; as {tensor.dtype} "
                f"{list(tensor.shape)}, after the tensors before it, it would have {expected}: download or write the "
                "file again."
            )
        begin += tensor.nbytes


def _tensor(file: Path, name: str, entry: dict[str, Any], offset: int) -> StoredTensor:
    _check_name(file, name)
    dtype, shape = SAFETENSORS_DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
    if dtype is None:
        raise ValueError(
            f"`{name}` in {file} is stored as {entry.get('dtype')}, which torch cannot hold; expected one of "
            f"{', '.join(SAFETENSORS_DTYPES)}."
        )
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_size, shape)):
        raise ValueError(
            f"`{name}` in {file} has the `shape` {shape!r}: expected a list of sizes; download or write the file "
            "again."
        )
    return StoredTensor(file, name, dtype, tuple(shape), offset)


def open_pickle(file: Path) -> Any:
    """A pickle's content, mapped where it can be; of what torch allows, and no more.

    Raises:
        ValueError: it holds anything else, cannot be read, or is damaged.
    """
    check_file(file)
    zipped = zipfile.is_zipfile(file)
    storages: list[tuple[int, int]] = []

    def keep(storage: Any, _: str) -> Any:
        storages.append((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        content = torch.load(file, map_location=keep if zipped else "cpu", weights_only=True, mmap=zipped)
        is_whole = not zipped or _are_records(file, storages)
    except PermissionError:
        raise
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a checkpoint: {_why_not(error)}") from error
    if not is_whole:
        raise ValueError(
            f"{file} holds records that are compressed, or not as long as its tensors: it is damaged, or no file that "
            "`torch.save` wrote; download or write it again."
        )
    return content


def _are_records(file: Path, storages: list[tuple[int, int]]) -> bool:
    """Whether mapped storages, by address and size, are the records of a zip: torch maps as many bytes as a tensor
    should have, whatever is there."""
    with zipfile.ZipFile(file) as archive:
        records = [record for record in archive.infolist() if re.fullmatch(r"[^/]+/data/[^/]+", record.filename)]
    sizes = [record.file_size for record in sorted(records, key=lambda record: record.header_offset)]
    is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    return is_stored and list(filter(None, sizes)) == [size for _, size in sorted(storages) if size]


def _why_not(error: Exception) -> str:
    """What is wrong with a pickle; torch's own text advises to read it without `weights_only`."""
    if stranger := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds a `{stranger[1]}`. Pickles that hold anything but plain tensors are refused, as they may run "
            "any program: write it again without that."
        )
    first = next(iter(str(error).splitlines()), "")
    detail = "" if not first or "weights_only" in first else f" ({shorten(first, 100)})"
    return f"it is empty, cut off, or nothing that `torch.save` wrote{detail}; download or write it again."


def _pickle_header(file: Path) -> list[StoredTensor]:
    content = open_pickle(file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds something else than named tensors, a {type(content).__name__}: expected a model's "
            "`state_dict()`; write that."
        )
    return [stored_tensor(file, name, value) for name, value in content.items()]


def stored_tensor(file: Path, name: Any, value: Any) -> StoredTensor:
    """What a pickle holds under a name.

    Raises:
        ValueError: it is no tensor with a name that a safetensors file could hold.
    """
    if isinstance(value, dict) and name in _WRAPPERS:
        raise ValueError(
            f"{file} holds something else than named tensors: its tensors are inside {name!r}; write that inner "
            "dictionary alone."
        )
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{file} holds something else than named tensors: {name!r} is of type {type(value).__name__}; write it "
            "again without that."
        )
    if not isinstance(name, str):
        raise ValueError(f"{file} holds a tensor called {name!r}: expected a name; write it again without that.")
    _check_name(file, name)
    if kind := _kind(value):
        raise ValueError(f"`{name}` in {file} is {kind}: expected a plain tensor; write it again as one.")
    if value.dtype not in SAFETENSORS_DTYPES.values():
        raise ValueError(
            f"`{name}` in {file} is stored as {value.dtype}, which safetensors files do not hold one by one: expected "
            f"one of {', '.join(SAFETENSORS_DTYPES)}; write it again as one."
        )
    return StoredTensor(file, name, value.dtype, tuple(value.shape))


def _kind(value: torch.Tensor) -> str:
    """What a tensor is that is not plain."""
    if value.is_quantized:
        return "quantised by torch"
    if value.layout != torch.strided:
        return f"stored as {value.layout}"
    if value.is_meta:
        return "without values, on the meta device"
    return "stored as fewer values than it has" if value.untyped_storage().nbytes() < value.nbytes else ""


def refuse_undeclared_quantization(stored: dict[str, StoredTensor]) -> None:
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
