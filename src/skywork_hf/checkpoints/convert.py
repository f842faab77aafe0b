"""Writing a checkpoint from another: streamed, resumable, verified, and there only when it is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..configuration_skywork import SkyworkMoeConfig
from ..headers import StoredTensor
from ..readers import Reader
from .adapters import merge_adapter
from .beside import Beside, read_beside
from .inspection import CONFIG_FILE, read_config
from .layouts import HUB, LLAMA, MEGATRON, TRAINING, to_training
from .recipes import Product, Recipe, Source
from .sources import read_source
from .transforms import cast, is_quantized, quantize, upcycle
from .unfinished import MANIFEST, Unfinished
from .writer import bytes_of, finish_shard, split_into_shards, write_shard, write_text

TARGETS = (HUB, TRAINING, LLAMA)
# The recipes of each file, by its name; and for each recipe the checksums of its products.
Shards = dict[str, list[Recipe]]
Checksums = list[list[str]]
# Beside the weights there are an index, a config and the tokenizer.
_SPARE_BYTES = 2**26


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = HUB,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    max_shard_size: str | int = "5GB",
    adapter: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    verify: bool = True,
) -> Path:
    """Write a checkpoint in another layout, dtype or sharding.

    Peak private memory is a few tensors, whatever the size of the checkpoint. The result appears under its name when
    it is complete, synced and verified; until then it is in `destination` + ".unfinished", where `resume` finds it.

    Args:
        source: a folder in the Hub's layout (`.bin` or safetensors), the training layout, or of Megatron-LM.
        destination: the folder to write; it must not be there yet.
        to: "hub", "training", or "llama" (dense models: Llama's classes compute exactly the same).
        dtype: of all tensors; None leaves them as they are.
        quantization: "int8", "fp8" or "fp8-weight-only": one byte for each weight of attention and experts.
        max_shard_size: of a file, as "5GB" or a number of bytes.
        adapter: the folder of a PEFT adapter to merge into the weights.
        config: a `config.json` for Megatron's checkpoints that say too little of themselves, and for no others.
        resume: go on with what an interrupted conversion with the same arguments has left, or see that it had ended.
        verify: read the result and the source again, by other means, and compare every value.

    Returns:
        `destination`.

    Raises:
        ValueError: the source is not whole, something is there already, a combination makes no sense, or a tensor was
            not written as it was made.
        OSError: the disk is full, or a file cannot be read or written. What is finished stays for `resume`.
    """
    found = _read(source, config)
    if adapter is not None:
        found = merge_adapter(found, Path(adapter))
    if dtype is not None:
        found = cast(found, dtype)
    if quantization is not None:
        found = quantize(found, quantization)
    return write_checkpoint(
        found, Path(destination), to=to, max_shard_size=max_shard_size, resume=resume, verify=verify
    )


def _read(folder: str | Path, config: str | Path | None) -> Source:
    source = read_source(Path(folder), None if config is None else read_config(Path(config)))
    if config is not None and source.layout != MEGATRON:
        raise ValueError(
            f"`config` (--config) is for checkpoints of Megatron-LM, and {folder} is none: leave it out, as "
            f"{source.folder / CONFIG_FILE} is used."
        )
    return source


def quantize_checkpoint(source: str | Path, destination: str | Path, method: str, **options: Any) -> Path:
    """Write a 16-bit checkpoint with one byte for each weight of attention and experts.

    Args:
        method: "int8", "fp8" (activations too, where a GPU multiplies FP8) or "fp8-weight-only".
        options: `config`, `max_shard_size`, `resume`, `verify` of `convert_checkpoint`, which says what is raised.
    """
    return convert_checkpoint(source, destination, quantization=method, **options)


def upcycle_checkpoint(
    source: str | Path,
    destination: str | Path,
    experts: int,
    *,
    top_k: int = 2,
    interval: int = 1,
    seed: int = 0,
    noise: float = 0.0,
    config: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    resume: bool = False,
    verify: bool = True,
    **fields: Any,
) -> Path:
    """Write a MoE checkpoint whose experts are copies of a dense one's feed-forward networks; see `transforms.upcycle`
    for `experts` to `fields`, and `convert_checkpoint` for the rest and for what is raised."""
    made = upcycle(_read(source, config), experts, top_k, interval, seed, noise, **fields)
    return write_checkpoint(made, Path(destination), max_shard_size=max_shard_size, resume=resume, verify=verify)


def write_checkpoint(
    source: Source,
    destination: Path,
    *,
    to: str = HUB,
    max_shard_size: str | int = "5GB",
    resume: bool = False,
    verify: bool = True,
) -> Path:
    """Write what `source` describes; see `convert_checkpoint`."""
    if to not in TARGETS:
        raise ValueError(f"`to`={to!r}: expected one of {', '.join(TARGETS)}.")
    if to == LLAMA and (isinstance(source.config, SkyworkMoeConfig) or is_quantized(source)):
        raise ValueError(
            f"{source.folder} has experts or is quantised: only a dense checkpoint in 16 or 32 bit is a Llama (--to)."
        )
    if destination.name in ("", ".."):
        raise ValueError(f"{destination} cannot be made: expected the name of a new folder.")
    if to == TRAINING:
        source = replace(source, recipes=[recipe.renamed(to_training) for recipe in source.recipes])
    beside = read_beside(source, to)
    shards = split_into_shards(source.recipes, bytes_of(max_shard_size))
    unfinished = Unfinished(destination, _fingerprint(source, beside, shards, to))
    if resume and unfinished.is_finished(verify):
        unfinished.clean_up()
        return destination
    if os.path.lexists(destination):
        raise ValueError(f"{destination} is there already: choose another name, or remove it.")
    _refuse_sources_below(unfinished.folder, source)
    try:
        unfinished.begin(resume)
        _check_space(unfinished, shards)
        checksums = _write_shards(unfinished, shards)
        beside.write(unfinished.result)
        _write_index(unfinished.result, shards)
        if verify:
            _verify(unfinished, shards)
        _write_manifest(source, unfinished, shards, checksums, to, verify)
        unfinished.finish()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"The disk of {unfinished.folder} is full: make room and go on with `resume`, or remove that folder."
            ) from error
        raise
    finally:
        unfinished.release()
    return destination


def _fingerprint(source: Source, beside: Beside, shards: Shards, to: str) -> str:
    """What an interrupted conversion must have in common with the one that goes on with it."""
    products = [[(p.name, str(p.dtype), p.shape) for r in shard for p in r.products] for shard in shards.values()]
    files = (*_source_files(source), *beside.sources)
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([to, products, stats, source.config.to_json_string(), source.changes])
    return hashlib.sha256(content.encode()).hexdigest()


def _source_files(source: Source) -> list[Path]:
    tensors = {tensor for recipe in source.recipes for tensor in recipe.sources}
    return sorted({tensor.file.resolve() for tensor in tensors})


def _refuse_sources_below(folder: Path, source: Source) -> None:
    for path in (source.folder, *_source_files(source)):
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} lies in {folder}, which the result is written into: choose another destination.")


def _check_space(unfinished: Unfinished, shards: Shards) -> None:
    to_write = sum(
        recipe.nbytes
        for name, recipes in shards.items()
        if _checksums(unfinished, name, recipes) is None
        for recipe in recipes
    )
    free = shutil.disk_usage(unfinished.folder).free
    if to_write + _SPARE_BYTES > free:
        unfinished.remove_if_nothing_is_written()
        raise OSError(
            f"The disk of {unfinished.folder.parent} has {free / 2**30:.4g} GiB free and {to_write / 2**30:.4g} GiB "
            f"are still to be written, with {_SPARE_BYTES / 2**30:.4g} GiB to spare for what lies beside the weights: "
            "make room, or write to another disk."
        )


def _progress(shards: Shards, what: str) -> Any:
    total = sum(recipe.nbytes for recipes in shards.values() for recipe in recipes)
    return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=what)


def _write_shards(unfinished: Unfinished, shards: Shards) -> dict[str, Checksums]:
    """Write those that are not there yet. Returns what `write_shard` does, for each."""
    reader, checksums = Reader(), {}
    # One shard goes to the disk while the next is being made.
    with _progress(shards, "Writing") as bar, ThreadPoolExecutor(max_workers=1) as finisher:
        finishing: Future[None] | None = None
        for name, recipes in shards.items():
            written = _checksums(unfinished, name, recipes)
            if written is not None:
                bar.update(sum(recipe.nbytes for recipe in recipes))
                checksums[name] = written
                continue
            checksums[name] = write_shard(unfinished.result / name, recipes, reader, bar.update)
            if finishing is not None:
                finishing.result()
            unfinished.write_notes(name, checksums[name])
            finishing = finisher.submit(finish_shard, unfinished.result / name)
        if finishing is not None:
            finishing.result()
    return checksums


def _checksums(unfinished: Unfinished, shard: str, recipes: list[Recipe]) -> Checksums | None:
    """What `write_shard` has returned for a whole shard; None where it is still to be written, or nobody knows."""
    notes = unfinished.read_notes(shard)
    try:
        fits = [list(map(len, of_recipe)) for of_recipe in notes] == [[8] * len(r.products) for r in recipes]
    except TypeError:
        return None
    return notes if fits else None


def _manifest_entries(source: Path, shards: Shards, checksums: dict[str, Checksums]) -> list[dict[str, Any]]:
    """For each recipe what it was made of, and what became of it."""
    return [
        {
            "sources": [_manifest_source(source, tensor) for tensor in recipe.sources],
            "products": [
                {
                    "name": product.name,
                    "file": name,
                    "dtype": str(product.dtype).removeprefix("torch."),
                    "shape": list(product.shape),
                    "crc32": checksum,
                }
                for product, checksum in zip(recipe.products, of_recipe, strict=True)
            ],
        }
        for name, recipes in shards.items()
        for recipe, of_recipe in zip(recipes, checksums[name], strict=True)
    ]


def _manifest_source(folder: Path, tensor: StoredTensor) -> dict[str, str]:
    """A tensor by its name and its file below the checkpoint's folder; an adapter's, by the adapter's."""
    inside = tensor.file.is_relative_to(folder)
    file = tensor.file.relative_to(folder if inside else tensor.file.parent.parent)
    return {"file": file.as_posix(), "name": tensor.name}


def _write_index(folder: Path, shards: Shards) -> None:
    if len(shards) == 1:
        return
    files = {p.name: name for name, recipes in shards.items() for recipe in recipes for p in recipe.products}
    size = sum(recipe.nbytes for recipes in shards.values() for recipe in recipes)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_manifest(
    source: Source,
    unfinished: Unfinished,
    shards: Shards,
    checksums: dict[str, Checksums],
    to: str,
    verified: bool,
) -> None:
    manifest = {
        "source": {"layout": source.layout},
        "layout": to,
        "verified": verified,
        "changes": source.changes,
        "tensors": _manifest_entries(source.folder, shards, checksums),
        "ignored": [_manifest_source(source.folder, tensor) for tensor in source.ignored],
        "fingerprint": unfinished.fingerprint,
    }
    write_text(unfinished.result / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _verify(unfinished: Unfinished, shards: Shards) -> None:
    """Read every tensor of the result by safetensors, make it from the source once more, and compare.

    Raises:
        ValueError: some differ. Their files are dropped, so that `resume` writes them again.
    """
    reader, wrong = Reader(), []
    with _progress(shards, "Verifying") as bar:
        for name, recipes in shards.items():
            for recipe in recipes:
                expected = recipe.values(reader.read(recipe.sources))
                for product, value in zip(recipe.products, expected, strict=True):
                    if not _is_written(unfinished.result / name, product, value):
                        wrong.append((name, product.name))
                    bar.update(product.nbytes)
    for name in {name for name, _ in wrong}:
        unfinished.drop(name)
    if wrong:
        more = f", nor are {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"`{wrong[0][1]}` in {unfinished.result / wrong[0][0]} is not what was to be written{more}: the disk may "
            "be failing. What is wrong is removed, and `resume` writes it again."
        )


def _is_written(file: Path, product: Product, expected: torch.Tensor) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            written = opened.get_tensor(product.name)
    except (SafetensorError, OSError):  # cut off, or gone
        return False
    same = written.dtype == expected.dtype and written.shape == expected.shape
    # As bytes: NaN is equal to itself here.
    return same and torch.equal(_bytes(written), _bytes(expected))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
