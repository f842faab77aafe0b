"""Safetensors shards, written tensor by tensor as these are made, so that no more than a few are in memory."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from ..headers import SAFETENSORS_DTYPES
from ..readers import Reader
from .recipes import Product, Recipe

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Written at a time, so that the progress bar moves.
_CHUNK = 2**24


def bytes_of(max_shard_size: str | int) -> int:
    """What "5GB", "1000000" or a number of bytes says.

    Raises:
        ValueError: it says no size above 0.
    """
    size: Any = max_shard_size
    try:
        size = convert_file_size_to_int(int(size) if str(size).isdecimal() else size)
    except (ValueError, OverflowError, AttributeError):
        size = 0
    if size <= 0:
        raise ValueError(
            f"`max_shard_size` (--max-shard-size) {max_shard_size!r}: expected a size above 0, as 5GB, or a number of "
            "bytes."
        )
    return int(size)


def split_into_shards(recipes: Iterable[Recipe], max_bytes: int) -> dict[str, list[Recipe]]:
    """Recipes in order, as many in each shard as fit; at least one, named as transformers names the files."""
    shards: list[list[Recipe]] = [[]]
    size = 0
    for recipe in recipes:
        if shards[-1] and size + recipe.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(recipe)
        size += recipe.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def write_shard(file: Path, recipes: list[Recipe], reader: Reader, progress: Callable[[int], Any]) -> list[list[str]]:
    """Write the content of one safetensors file to `file`, which `finish_shard` will give its name.

    Tensors are read and made in another thread while those before them are written.

    Returns:
        For each recipe the products' checksums, CRC-32 in hexadecimal digits.
    """
    header, offsets = _header([product for recipe in recipes for product in recipe.products])
    checksums = []
    with part_of(file).open("wb") as stream:
        stream.write(header)
        for recipe, values, of_values in _made_ahead(recipes, reader):
            for product, value in zip(recipe.products, values, strict=True):
                offset = len(header) + offsets[product.name]
                copied = _copy(recipe, stream.fileno(), offset, progress)
                _write(stream.fileno(), as_bytes(value)[copied:], offset + copied, progress)
            checksums.append(of_values)
    return checksums


def finish_shard(file: Path) -> None:
    """Wait until the content is on the disk, and give it its name."""
    sync(part_of(file))
    part_of(file).rename(file)


def write_text(file: Path, text: str) -> None:
    """Write a small file, which is there when it is whole and on the disk."""
    part_of(file).write_text(text, encoding="utf-8")
    sync(part_of(file))
    part_of(file).rename(file)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def part_of(file: Path) -> Path:
    """What a file is called until it is complete."""
    return file.with_name(f"{file.name}.part")


def _header(products: list[Product]) -> tuple[bytes, dict[str, int]]:
    """The file's header, and where in the data each tensor begins: larger dtypes first, so that all are aligned."""
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for product in sorted(products, key=lambda product: -product.dtype.itemsize):
        offsets[product.name] = end
        end += product.nbytes
        entries[product.name] = {
            "dtype": _DTYPE_NAMES[product.dtype],
            "shape": list(product.shape),
            "data_offsets": [offsets[product.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _made_ahead(recipes: list[Recipe], reader: Reader) -> Iterator[tuple[Recipe, list[torch.Tensor], list[str]]]:
    """Each recipe with its values and their checksums, while the next is being made."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        ahead: Future[Any] | None = None
        for number in range(len(recipes) + 1):
            made = ahead
            ahead = maker.submit(_make, recipes[number], reader) if number < len(recipes) else None
            if made is not None:
                values, checksums = made.result()
                yield recipes[number - 1], values, checksums
                del values, made


def _make(recipe: Recipe, reader: Reader) -> tuple[list[torch.Tensor], list[str]]:
    values = [value.contiguous() for value in recipe.values(reader.read(recipe.sources))]
    for product, value in zip(recipe.products, values, strict=True):
        if value.dtype != product.dtype or tuple(value.shape) != product.shape:
            raise ValueError(
                f"`{product.name}` came out as {value.dtype} {list(value.shape)}, expected {product.dtype} "
                f"{list(product.shape)}."
            )
    return values, [f"{zlib.crc32(as_bytes(value)):08x}" for value in values]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    values: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _copy(recipe: Recipe, descriptor: int, offset: int, progress: Callable[[int], Any]) -> int:
    """Have the kernel copy an unchanged tensor from file to file, so that no page of it goes through this process.

    Returns:
        How many bytes were copied: all, or fewer where the file systems or the source's format do not allow it.
    """
    source = recipe.sources[0] if recipe.make is None else None
    if source is None or source.offset is None or not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    with source.file.open("rb") as stream:
        while done < source.nbytes:
            size = min(_CHUNK, source.nbytes - done)
            try:
                copied = os.copy_file_range(stream.fileno(), descriptor, size, source.offset + done, offset + done)
            except OSError:
                break  # not possible here, or what is wrong with the disk will meet the write too
            if copied == 0:
                break
            done += copied
            progress(copied)
    return done


def _write(descriptor: int, data: memoryview, offset: int, progress: Callable[[int], Any]) -> None:
    while data:
        written = os.pwrite(descriptor, data[:_CHUNK], offset)
        data, offset = data[written:], offset + written
        progress(written)
