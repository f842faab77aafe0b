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
from accelerate.utils import convert_file_size_to_int
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import LlamaConfig

from ..configuration_skywork import SkyworkMoeConfig
from ..headers import StoredTensor
from ..tokenization_skywork import SkyworkTokenizer
from .adapters import merge_adapter
from .inspection import CONFIG_FILE, TOKENIZER_FILES
from .layouts import HUB, LLAMA, TRAINING, config_of, model_class_of, to_training
from .readers import Reader
from .recipes import Product, Recipe, Source
from .sources import read_source
from .transforms import cast, is_quantized, quantize, upcycle
from .writer import finish_shard, part_of, split_into_shards, write_shard

TARGETS = (HUB, TRAINING, LLAMA)
MANIFEST = "conversion.json"
_FINGERPRINT = "fingerprint"
_CARRIED = ("generation_config.json", "tokenizer.model", "LICENSE", "LICENSE.md")
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
        to: "hub", "training", or "llama" (dense models: `LlamaForCausalLM` computes exactly the same).
        dtype: of all tensors; None leaves them as they are.
        quantization: "int8", "fp8" or "fp8-weight-only": one byte for each weight of attention and experts.
        max_shard_size: of a file, as "5GB".
        adapter: the folder of a PEFT adapter to merge into the weights.
        config: a `config.json` for Megatron's checkpoints that say too little of themselves.
        resume: go on with what an interrupted conversion with the same arguments has left.
        verify: read the result and the source again, by other means, and compare every value.

    Returns:
        `destination`.

    Raises:
        ValueError: the source is not whole, something is there already, or a combination makes no sense.
        OSError: the disk is full, or a file cannot be read or written. What is finished stays for `resume`.
    """
    found = read_source(Path(source), _read_config(config))
    if adapter is not None:
        found = merge_adapter(found, Path(adapter))
    if dtype is not None:
        found = cast(found, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if quantization is not None:
        found = quantize(found, quantization)
    return write_checkpoint(
        found, Path(destination), to=to, max_shard_size=max_shard_size, resume=resume, verify=verify
    )


def _read_config(file: str | Path | None) -> Any:
    return None if file is None else config_of(json.loads(Path(file).read_text(encoding="utf-8")))


def quantize_checkpoint(source: str | Path, destination: str | Path, method: str, **options: Any) -> Path:
    """Write a 16-bit checkpoint with one byte for each weight of attention and experts.

    Args:
        method: "int8", "fp8" (activations too, where a GPU multiplies FP8) or "fp8-weight-only".
        options: `max_shard_size`, `resume`, `verify` of `convert_checkpoint`, which says what is raised.
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
    max_shard_size: str | int = "5GB",
    resume: bool = False,
    verify: bool = True,
    **fields: Any,
) -> Path:
    """Write a MoE checkpoint whose experts are copies of a dense one's feed-forward networks; see `transforms.upcycle`
    for `experts` to `fields`, and `convert_checkpoint` for the rest and for what is raised."""
    made = upcycle(read_source(Path(source)), experts, top_k, interval, seed, noise, **fields)
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
    if destination.exists():
        raise ValueError(f"{destination} is there already: choose another name, or remove it.")
    if to == LLAMA and (isinstance(source.config, SkyworkMoeConfig) or is_quantized(source)):
        raise ValueError("Only a dense checkpoint in 16 or 32 bit is a Llama.")
    if to == TRAINING:
        source = replace(source, recipes=[recipe.renamed(to_training) for recipe in source.recipes])
    size = convert_file_size_to_int(max_shard_size)
    shards = split_into_shards(source.recipes, size)
    unfinished = _begin(source, destination, shards, to, resume)
    _check_space(unfinished, shards)
    try:
        checksums = _write_shards(unfinished, shards)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"The disk of {unfinished} is full: make room and go on with `resume`, or remove that folder."
            ) from error
        raise
    entries = _manifest_entries(source.folder, shards, checksums)
    _write_beside(source, unfinished, entries, to)
    if verify:
        _verify(unfinished, shards)
    shutil.rmtree(unfinished / "progress")
    _sync(unfinished)
    unfinished.rename(destination)
    _sync(destination.parent)
    return destination


def _begin(source: Source, destination: Path, shards: list[list[Recipe]], to: str, resume: bool) -> Path:
    """The folder to write into, empty or with what an equal conversion has left."""
    unfinished = destination.with_name(f"{destination.name}.unfinished")
    fingerprint = _fingerprint(source, shards, to)
    state = unfinished / "progress" / _FINGERPRINT
    if unfinished.exists() and resume:
        if not state.is_file() or state.read_text() != fingerprint:
            raise ValueError(
                f"{unfinished} was begun from another source or with other arguments: remove it, or convert as then."
            )
        return unfinished
    shutil.rmtree(unfinished, ignore_errors=True)
    state.parent.mkdir(parents=True)
    state.write_text(fingerprint)
    return unfinished


def _fingerprint(source: Source, shards: list[list[Recipe]], to: str) -> str:
    """What an interrupted conversion must have in common with the one that goes on with it."""
    products = [[(p.name, str(p.dtype), p.shape) for r in shard for p in r.products] for shard in shards]
    tensors = {tensor for recipe in source.recipes for tensor in recipe.sources}
    files = sorted({tensor.file.resolve() for tensor in tensors})
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([to, products, stats, source.config.to_json_string()])
    return hashlib.sha256(content.encode()).hexdigest()


def _check_space(unfinished: Path, shards: list[list[Recipe]]) -> None:
    needed = sum(product.nbytes for shard in shards for recipe in shard for product in recipe.products)
    there = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
    free = shutil.disk_usage(unfinished).free
    if needed - there + _SPARE_BYTES > free:
        raise OSError(
            f"The disk of {unfinished.parent} has {free / 2**30:.4g} GiB free and {(needed - there) / 2**30:.4g} GiB "
            "are still to be written: make room, or write to another disk."
        )


def _write_shards(unfinished: Path, shards: list[list[Recipe]]) -> list[list[list[str]]]:
    """Write those that are not there yet. Returns what `write_shard` does, for each."""
    total = sum(product.nbytes for shard in shards for recipe in shard for product in recipe.products)
    reader, checksums = Reader(), []
    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Writing")
    # One shard goes to the disk while the next is being made.
    with bar, ThreadPoolExecutor(max_workers=1) as finisher:
        finishing: Future[None] | None = None
        for number, recipes in enumerate(shards, start=1):
            name = shard_name(number, len(shards))
            notes = unfinished / "progress" / f"{name}.json"
            if (unfinished / name).is_file() and notes.is_file():
                bar.update(sum(product.nbytes for recipe in recipes for product in recipe.products))
            else:
                written = write_shard(unfinished / name, recipes, reader, bar.update)
                if finishing is not None:
                    finishing.result()
                _write_text(notes, json.dumps(written))
                finishing = finisher.submit(finish_shard, unfinished / name)
            checksums.append(json.loads(notes.read_text()))
        if finishing is not None:
            finishing.result()
    return checksums


def shard_name(number: int, count: int) -> str:
    """As transformers calls it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_text(file: Path, text: str) -> None:
    """Whole or not at all."""
    part_of(file).write_text(text, encoding="utf-8")
    part_of(file).rename(file)


def _manifest_entries(
    source: Path, shards: list[list[Recipe]], checksums: list[list[list[str]]]
) -> list[dict[str, Any]]:
    """For each recipe what it was made of, and what became of it."""
    return [
        {
            "sources": [_manifest_source(source, tensor) for tensor in recipe.sources],
            "products": [
                {
                    "name": product.name,
                    "file": shard_name(number, len(shards)),
                    "dtype": str(product.dtype).removeprefix("torch."),
                    "shape": list(product.shape),
                    "crc32": checksum,
                }
                for product, checksum in zip(recipe.products, of_recipe, strict=True)
            ],
        }
        for number, (recipes, of_shard) in enumerate(zip(shards, checksums, strict=True), start=1)
        for recipe, of_recipe in zip(recipes, of_shard, strict=True)
    ]


def _manifest_source(folder: Path, tensor: StoredTensor) -> dict[str, str]:
    """A tensor by its name and its file below the checkpoint's folder; an adapter's, by the adapter's."""
    inside = tensor.file.is_relative_to(folder)
    file = tensor.file.relative_to(folder if inside else tensor.file.parent.parent)
    return {"file": file.as_posix(), "name": tensor.name}


def _write_beside(source: Source, folder: Path, entries: list[dict[str, Any]], to: str) -> None:
    """Index, config, tokenizer and manifest."""
    products = [product for entry in entries for product in entry["products"]]
    if len({product["file"] for product in products}) > 1:
        index = {
            "metadata": {"total_size": sum(file.stat().st_size for file in folder.glob("*.safetensors"))},
            "weight_map": {product["name"]: product["file"] for product in sorted(products, key=lambda p: p["name"])},
        }
        _write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    _write_config(source, folder, to)
    _write_tokenizer(source.tokenizer or source.folder, folder, to)
    ignored = [_manifest_source(source.folder, tensor) for tensor in source.ignored]
    manifest = {"source": {"layout": source.layout}, "layout": to, "tensors": entries, "ignored": ignored}
    _write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _write_config(source: Source, folder: Path, to: str) -> None:
    config = source.config
    if to == LLAMA:
        fields = {name: value for name, value in config.to_dict().items() if name in LlamaConfig().to_dict()}
        config = LlamaConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "architectures")})
        config.architectures = ["LlamaForCausalLM"]
    else:
        config.architectures = [model_class_of(config).__name__]
    # All fields: the training layout's defaults are others.
    config.to_json_file(folder / CONFIG_FILE, use_diff=to != TRAINING)
    for name in _CARRIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def _write_tokenizer(source: Path, folder: Path, to: str) -> None:
    """The source's tokenizer with a `tokenizer.json`, which every program reads."""
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        return
    SkyworkTokenizer.from_pretrained(source).save_pretrained(folder)
    if to == LLAMA:  # for programs that know no Skywork
        file = folder / "tokenizer_config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(folder: Path, shards: list[list[Recipe]]) -> None:
    """Read every tensor of the result by safetensors, make it from the source once more, and compare.

    Raises:
        ValueError: one differs.
    """
    reader = Reader()
    numbered = [(number, recipe) for number, shard in enumerate(shards, start=1) for recipe in shard]
    total = sum(product.nbytes for _, recipe in numbered for product in recipe.products)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Verifying") as bar:
        for number, recipe in numbered:
            expected = recipe.values(reader.read(recipe.sources))
            for product, value in zip(recipe.products, expected, strict=True):
                _check_written(folder / shard_name(number, len(shards)), product, value)
                bar.update(product.nbytes)


def _check_written(file: Path, product: Product, expected: torch.Tensor) -> None:
    with safe_open(file, framework="pt") as opened:
        written = opened.get_tensor(product.name)
    same = written.dtype == expected.dtype and written.shape == expected.shape
    # As bytes: NaN is equal to itself here.
    if not (same and torch.equal(_bytes(written), _bytes(expected))):
        raise ValueError(f"`{product.name}` in {file} is not what was to be written: the disk may be failing.")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
