"""`skywork-hf inspect`: what a checkpoint is, from its `config.json` and the headers of its files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..configuration_skywork import FP8_METHOD, SkyworkConfig, SkyworkMoeConfig
from ..headers import StoredTensor, read_headers
from ..quantization.checks import INPUT_SCALE_NAMES
from ..quantization.config import INT8_METHOD
from ..untrusted import naming, read_json
from .layouts import (
    HUB,
    LLAMA,
    OTHER,
    PARTS,
    TRAINING,
    TRAINING_MARK,
    config_of,
    hub_shapes,
    is_base_model,
    is_training_layout,
    layout_named,
    part_named,
    to_training,
)

FAMILIES = {SkyworkConfig: "Skywork-13B (dense)", SkyworkMoeConfig: "Skywork-MoE"}
CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# In the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
LISTED_NAMES = 8
_LAYOUTS = {
    HUB: "Hub layout",
    TRAINING: f"training layout (`{TRAINING_MARK}` in the names), older than the Hub's",
    LLAMA: "Llama layout (the Hub's names, and a config of `LlamaForCausalLM`)",
}

_SCALES = "scales"
_INDENT = 15


@dataclass(frozen=True)
class _Storage:
    """A way to store quantised linears: the ends of the names that lie beside `weight`.

    Args:
        name: what people call it.
        needed: of each group one is there.
        allowed: may be there as well.
    """

    name: str
    needed: tuple[tuple[str, ...], ...]
    allowed: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        return (*(end for group in self.needed for end in group), *self.allowed)


_FP8 = _Storage("FP8", (("weight_scale",),), INPUT_SCALE_NAMES)
_STATIC_FP8 = _Storage("FP8", (("weight_scale",), INPUT_SCALE_NAMES))
_INT8 = _Storage("int8", (("weight_scale",),))
_BITSANDBYTES_8 = _Storage("bitsandbytes 8-bit", (("SCB",),), ("weight_format",))
_QUANT_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_BITSANDBYTES_4 = _Storage(
    "bitsandbytes 4-bit",
    (("weight.absmax",), ("weight.quant_map",), _QUANT_STATES),
    ("weight.nested_absmax", "weight.nested_quant_map"),
)
_METHODS = {
    **dict.fromkeys((_FP8, _STATIC_FP8), "FP8 (e4m3), one scale for each weight"),
    _INT8: "int8, one scale for each row of a weight",
    _BITSANDBYTES_8: "bitsandbytes LLM.int8(), one scale for each row of a weight",
}


@dataclass(frozen=True)
class Part:
    """One part of a model, as a checkpoint stores it.

    Args:
        name: embeddings, attention, experts, dense feed-forward, gate, norms, head, scales or other.
        parameters: how many; None for scales and other, which are not parameters of the model.
        dtypes: what its tensors are stored in, sorted.
        nbytes: the size of its tensors.
    """

    name: str
    parameters: int | None
    dtypes: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """What `inspect_checkpoint` found; `str` of it is what the command prints.

    Args:
        folder: the checkpoint.
        family: "Skywork-13B (dense)" or "Skywork-MoE".
        layout: whose names the tensors have, and how the weights are stored.
        files: the weight files that are there.
        file_bytes: their size.
        index: the index file that names them, or None.
        shape: the numbers of the config, by what they count.
        parameters: those of the model that the files hold. A quantised weight counts as its elements.
        active_parameters: those that work for one token.
        parts: the same by part, with dtypes and sizes.
        quantization: one or more sentences.
        missing: names of tensors that the config asks for and no file holds.
        unexpected: names of tensors that the config does not ask for; loading ignores them.
        contradictions: sentences on shapes, and on storage, that are not those that the config says.
        missing_shards: files that the index names and that are not there.
    """

    folder: Path
    family: str
    layout: str
    files: tuple[Path, ...]
    file_bytes: int
    index: str | None
    shape: dict[str, int]
    parameters: int
    active_parameters: int
    parts: tuple[Part, ...]
    quantization: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    contradictions: tuple[str, ...]
    missing_shards: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether everything that the config asks for is there and fits it."""
        return not (self.missing or self.contradictions or self.missing_shards)

    def __str__(self) -> str:
        return "\n".join(
            [
                str(self.folder),
                _line("family", self.family),
                _line("layout", self.layout),
                _line("files", self._files_text()),
                *_shape_lines(self.shape),
                _line("parameters", self._parameters_text()),
                _line("quantisation", self.quantization),
                "",
                *_table(self.parts),
                "",
                *_list("missing files", self.missing_shards),
                *_list("missing", self.missing),
                *_list("unexpected", self.unexpected),
                *_list("contradictions", self.contradictions),
            ]
        )

    def _files_text(self) -> str:
        kind = "safetensors" if self.files[0].suffix == ".safetensors" else f"{self.files[0].suffix} (pickle)"
        files = f"{len(self.files)} {kind} file{'s'[: len(self.files) > 1]}, {_gib(self.file_bytes)} GiB"
        if self.index:
            return f"{files}, named by {self.index}"
        return f"{files}, named by no index file" if len(self.files) > 1 else files

    def _parameters_text(self) -> str:
        total = f"{self.parameters:,}{_in_words(self.parameters)}"
        if "experts" not in self.shape:
            return total
        return f"{total}, active {self.active_parameters:,}{_in_words(self.active_parameters)}"


def inspect_checkpoint(path: str | Path) -> CheckpointReport:
    """Say what a checkpoint is and whether it is whole, without reading a weight.

    Args:
        path: a local folder with `config.json` and weight files, released, saved by transformers, quantised, as a
            Llama, or in the training layout.

    Raises:
        ValueError: `path` is not a folder; `config.json` is missing or not Skywork's; there are no weight files; a
            file is cut off or holds something else than tensors. Names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: expected one with config.json and weight files. `hf download OWNER/NAME` "
            "fetches a checkpoint from the Hub and prints its folder."
        )
    raw = _read_raw_config(folder / CONFIG_FILE)
    files, index, missing_shards = weight_files(folder)
    stored = _read_headers(files, index)
    config, shapes = _model_of(folder / CONFIG_FILE, raw, is_training_layout(stored))
    layout = layout_named(raw["model_type"], stored)
    contents = _Contents(stored, shapes, raw.get("quantization_config") or {}, layout)
    parts = contents.parts()
    parameters = {part.name: part.parameters or 0 for part in parts}
    total = sum(parameters.values())
    return CheckpointReport(
        folder=folder,
        family=FAMILIES[type(config)],
        layout=contents.layout(),
        files=tuple(files),
        file_bytes=sum(file.stat().st_size for file in files),
        index=index,
        shape=_shape(config),
        parameters=total,
        active_parameters=total - _idle(parameters.get("experts", 0), config),
        parts=parts,
        quantization=contents.quantization_text(),
        missing=tuple(contents.missing(may_lack_head=config.tie_word_embeddings)),
        unexpected=tuple(contents.unexpected()),
        contradictions=tuple(contents.contradictions()),
        missing_shards=missing_shards,
    )


def read_config(file: Path, training: bool = False) -> SkyworkConfig | SkyworkMoeConfig:
    """The config that a file describes.

    Args:
        file: a `config.json`.
        training: whether it lies beside weights in the training layout.

    Raises:
        ValueError: it is not there, not JSON, not Skywork's, or describes no model. Names the file.
    """
    raw = _read_raw_config(file)
    with naming(file):
        return config_of(raw, training)


def _read_raw_config(file: Path) -> dict[str, Any]:
    raw = read_json(file)
    if raw.get("model_type") not in ("skywork", "skywork_moe", LLAMA):
        raise ValueError(
            f'{file} is of a {raw.get("model_type")!r} model: expected `model_type` "skywork" or "skywork_moe", or '
            '"llama", as a dense one may be called. Take config.json from where the weights came from.'
        )
    if not isinstance(raw.get("quantization_config") or {}, dict):
        raise ValueError(f"`quantization_config` of {file} is not a dictionary: download or write the file again.")
    return raw


def _model_of(file: Path, raw: dict[str, Any], training: bool) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The config, and name and shape of every tensor of the model that it describes, under the Hub's names."""
    # Quantised modules need the methods' own libraries; what lies beside a weight is added where it is looked for.
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    with naming(file):
        config = config_of(plain, training)
        return config, hub_shapes(config)


def _read_headers(files: list[Path], index: str | None) -> dict[str, StoredTensor]:
    try:
        return read_headers(files)
    except ValueError as error:
        if index or files[0].name in WEIGHT_FILES:
            raise
        raise ValueError(
            f"{error} No index names the shards, so that all *{files[0].suffix} files were taken for some: move away "
            "what is none."
        ) from error


def weight_files(folder: Path) -> tuple[list[Path], str | None, tuple[str, ...]]:
    """The weight files that are there, the index that names them, and the files that it names and are not there."""
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return [folder / name], None, ()
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = _shards(index)
            found = [folder / shard for shard in shards if (folder / shard).exists()]
            if not found:
                raise ValueError(f"None of the {len(shards)} files that {index} names is there: download them too.")
            return found, index.name, tuple(shard for shard in shards if folder / shard not in found)
    # The training code's own files have no fixed names.
    for ending in ("safetensors", "bin", "pt", "pth"):
        files = sorted(folder.glob(f"*.{ending}"))
        if files:
            return files, None, ()
    raise ValueError(
        f"{folder} holds no weight files: expected {' or '.join(WEIGHT_FILES)}, or shards with an index such as "
        f"{WEIGHT_FILES[0]}.index.json. Download them too."
    )


def _shards(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(_is_file_name, names.values())):
        raise ValueError(f"{index} has no `weight_map` from tensors to files: download or write it again.")
    return sorted(set(names.values()))


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and name.isprintable()


class _Contents:
    """What the files hold, beside what the config asks for.

    Args:
        stored: the files' tensors.
        hub_shapes: name and shape of every tensor of the model, under the Hub's names.
        quantization: `quantization_config` of `config.json`; empty where it has none.
        layout: "hub", "training" or "llama".
    """

    def __init__(
        self,
        stored: dict[str, StoredTensor],
        hub_shapes: dict[str, tuple[int, ...]],
        quantization: dict[str, Any],
        layout: str,
    ) -> None:
        self.stored = stored
        self.quantization = quantization
        self.layout_name = layout
        self.is_base_model = is_base_model(stored)
        self.expected = {self._as_in_files(name): shape for name, shape in hub_shapes.items()}
        self.declared = _declared_storage(quantization)
        self.found = self._found_storage()
        self.beside = set(self._names_beside_weights())

    def _as_in_files(self, name: str) -> str:
        if self.layout_name == TRAINING:
            name = to_training(name)
        return name.removeprefix("model.") if self.is_base_model else name

    def _found_storage(self) -> _Storage | None:
        weights = [name for name in self.expected if name in self.stored]
        dtypes = {self.stored[name].dtype for name in weights}
        if torch.float8_e4m3fn in dtypes:
            return self.declared if self.declared in (_FP8, _STATIC_FP8) else _FP8
        if any(self._is_packed(name) for name in weights):
            return _BITSANDBYTES_4
        if torch.int8 in dtypes:
            is_bitsandbytes = self.declared is _BITSANDBYTES_8 or any(name.endswith(".SCB") for name in self.stored)
            return _BITSANDBYTES_8 if is_bitsandbytes else _INT8
        return None

    def _names_beside_weights(self) -> Iterator[str]:
        storage = self.found or self.declared
        if storage is None:
            return
        for name in self.expected:
            if name not in self.stored or self._is_quantized(name):
                yield from (_beside(name, end) for end in storage.ends)

    def _is_packed(self, name: str) -> bool:
        # bitsandbytes packs two weights into a byte, and may store the bytes as any dtype (`bnb_4bit_quant_storage`).
        has_state = any(_beside(name, end) in self.stored for end in _QUANT_STATES)
        return has_state or self.stored[name].dtype == torch.uint8

    def _is_quantized(self, name: str) -> bool:
        return self.stored[name].dtype in (torch.float8_e4m3fn, torch.int8) or self._is_packed(name)

    def _knows_scales(self) -> bool:
        # Methods that are not ours, such as FP8 in blocks, call and shape their scales otherwise.
        return self.declared is not None or not self.quantization

    def _parameters(self, name: str) -> int:
        return 2 * self.stored[name].nbytes if self._is_packed(name) else self.stored[name].numel

    def _stored_as(self, name: str) -> str:
        dtype = str(self.stored[name].dtype).removeprefix("torch.")
        return f"4-bit in {dtype}" if name in self.expected and self._is_packed(name) else dtype

    def _part_of(self, name: str) -> str:
        if name in self.beside:
            return _SCALES
        if name not in self.expected:
            return OTHER
        return part_named(name)

    def layout(self) -> str:
        kind = _LAYOUTS[self.layout_name]
        if self.is_base_model:
            kind += ", base model (no `model.` before the names)"
        dtypes = sorted({self._stored_as(name) for name in self.expected if name in self.stored})
        return f"{kind}, {self.found.name if self.found else ' and '.join(dtypes) or 'nothing of the model'}"

    def parts(self) -> tuple[Part, ...]:
        names: dict[str, list[str]] = {part: [] for part in (*PARTS, _SCALES, OTHER)}
        for name in self.stored:
            names[self._part_of(name)].append(name)
        return tuple(self._part(part, members) for part, members in names.items() if members)

    def _part(self, part: str, names: list[str]) -> Part:
        return Part(
            part,
            None if part in (_SCALES, OTHER) else sum(map(self._parameters, names)),
            tuple(sorted(set(map(self._stored_as, names)))),
            sum(self.stored[name].nbytes for name in names),
        )

    def missing(self, may_lack_head: bool) -> Iterator[str]:
        """Names that no file holds. A tied head is the embeddings; a base model has none."""
        for name in self.expected:
            if name in self.stored:
                yield from self._missing_beside(name)
            elif not (part_named(name) == "head" and (may_lack_head or self.is_base_model)):
                yield name

    def _missing_beside(self, name: str) -> Iterator[str]:
        if self.found and self._knows_scales() and self._is_quantized(name):
            for group in self.found.needed:
                names = [_beside(name, end) for end in group]
                if not any(other in self.stored for other in names):
                    yield names[0]

    def unexpected(self) -> Iterator[str]:
        for name in self.stored:
            if name not in self.expected and name not in self.beside and not name.endswith("rotary_emb.inv_freq"):
                yield name

    def contradictions(self) -> Iterator[str]:
        if self.found and not self.quantization:
            yield f"The weights are stored as {self.found.name}, and config.json has no `quantization_config`."
        elif self.declared and self.found is None:
            yield f"config.json says {self.declared.name}, and no weight is stored so."
        elif self.found and self.declared and self.found is not self.declared:
            yield f"config.json says {self.declared.name}, and the weights are stored as {self.found.name}."
        for name, shape in self.expected.items():
            if name in self.stored:
                yield from self._contradicting_shapes(name, shape)

    def _contradicting_shapes(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        tensor = self.stored[name]
        if self._is_packed(name):
            expected = math.prod(shape)
            if not expected <= self._parameters(name) < expected + 2 * tensor.dtype.itemsize:
                yield f"`{name}` packs {self._parameters(name):,} weights; config.json says {list(shape)}."
        elif tensor.shape != shape:
            yield f"`{name}` is {list(tensor.shape)}; config.json says {list(shape)}."
        elif self.found and self._knows_scales() and self._is_quantized(name):
            yield from self._contradicting_scales(name, self.found, shape[0])

    def _contradicting_scales(self, name: str, found: _Storage, rows: int) -> Iterator[str]:
        expected = 1 if found in (_FP8, _STATIC_FP8) else rows
        for end in (end for group in found.needed for end in group):
            scale = self.stored.get(_beside(name, end))
            if scale and scale.numel != expected:
                yield f"`{scale.name}` is {list(scale.shape)}; expected [{expected}]."

    def quantization_text(self) -> str:
        if not self.quantization:
            return f"config.json names none, yet weights are {self.found.name}." if self.found else "none"
        text = _method_text(self.quantization, self.declared)
        left_out = list(self._parts_left_out())
        return f"{text} Not quantised: {', '.join(left_out)}." if self.found and left_out else text

    def _parts_left_out(self) -> Iterator[str]:
        for part in PARTS:
            names = [name for name in self.expected if name in self.stored and part_named(name) == part]
            plain = [name for name in names if not self._is_quantized(name)]
            if plain:
                yield part if plain == names else f"{part} ({len(plain)} of {len(names)} tensors)"


def activations_text(quantization: dict[str, Any]) -> tuple[str, str] | None:
    """How weights are stored, and what becomes of activations, as a `quantization_config` says; None where it is of
    a method that is not known here, or of one that leaves activations as they are."""
    declared = _declared_storage(quantization)
    activations = _activations(quantization, declared)
    return (declared.name, activations) if declared and activations else None


def is_static(quantization: dict[str, Any]) -> bool:
    """Whether activations are quantised with scales from the files."""
    return _declared_storage(quantization) is _STATIC_FP8


def _declared_storage(quantization: dict[str, Any]) -> _Storage | None:
    method = quantization.get("quant_method")
    if method in ("fp8", FP8_METHOD) and not quantization.get("weight_block_size"):
        static = quantization.get("activation_scheme") == "static" and not quantization.get("weight_only")
        return _STATIC_FP8 if static else _FP8
    if method == INT8_METHOD:
        return _INT8
    # Older bitsandbytes files may not name the method.
    if method in ("bitsandbytes", None) and quantization.get("load_in_8bit"):
        return _BITSANDBYTES_8
    if method in ("bitsandbytes", None) and quantization.get("load_in_4bit"):
        return _BITSANDBYTES_4
    return None


def _method_text(quantization: dict[str, Any], declared: _Storage | None) -> str:
    if declared is None:
        return f"config.json names `{quantization.get('quant_method')}`, in a form that this command does not know."
    if declared is _BITSANDBYTES_4:
        kind = quantization.get("bnb_4bit_quant_type", "fp4")
        nested = " with quantised scales" if quantization.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes 4-bit ({kind}{nested}), weight-only."
    return f"{_METHODS[declared]}; {_activations(quantization, declared)}."


def _activations(quantization: dict[str, Any], declared: _Storage | None) -> str | None:
    """See `activations_text`."""
    scheme = quantization.get("activation_scheme")
    if declared is _INT8:
        weight_only = quantization.get("quantize_activations") is False
        return "weight-only" if weight_only else "activations are quantised where that is faster"
    if declared is _BITSANDBYTES_8:
        return f"activations are quantised too, but for outliers above {quantization.get('llm_int8_threshold', 6.0)}"
    if declared not in (_FP8, _STATIC_FP8):
        return None
    if quantization.get("weight_only") or scheme == "none":
        return "weight-only"
    if scheme == "static":
        return "static activation scheme: activations are quantised with scales from the files"
    if scheme == "dynamic":
        return "dynamic activation scheme: activations are quantised with scales taken while the model runs"
    return f"unknown activation scheme {scheme!r}"


def _beside(weight: str, end: str) -> str:
    return f"{weight.removesuffix('.weight')}.{end}"


def _shape(config: SkyworkConfig | SkyworkMoeConfig) -> dict[str, int]:
    shape: dict[str, Any] = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "context length": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
    }
    if isinstance(config, SkyworkMoeConfig):
        shape["experts"] = config.num_local_experts
        shape["experts for each token"] = config.num_experts_per_tok
        shape["layers with experts"] = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    return shape


def _idle(experts: int, config: SkyworkConfig | SkyworkMoeConfig) -> int:
    """How many of the experts' parameters do not work for a token."""
    if not isinstance(config, SkyworkMoeConfig):
        return 0
    return experts - experts * config.num_experts_per_tok // config.num_local_experts


def _line(label: str, text: str) -> str:
    indent = " " * _INDENT
    return textwrap.fill(
        text, width=100, initial_indent=label.ljust(_INDENT), subsequent_indent=indent, break_on_hyphens=False
    )


def _shape_lines(shape: dict[str, int]) -> list[str]:
    heads = f"{shape['heads']} heads"
    if shape["key/value heads"] != shape["heads"]:
        heads += f" ({shape['key/value heads']} for keys and values)"
    sizes = f"hidden {shape['hidden']}, intermediate {shape['intermediate']}, {shape['layers']} layers, {heads}"
    lines = [_line("shape", f"{sizes}, context {shape['context length']}, vocabulary {shape['vocabulary']}")]
    if "experts" in shape:
        experts = f"{shape['experts']} in {shape['layers with experts']} of {shape['layers']} layers"
        lines.append(_line("experts", f"{experts}, {shape['experts for each token']} for each token"))
    return lines


def _table(parts: tuple[Part, ...]) -> list[str]:
    counts = ["-" if part.parameters is None else f"{part.parameters:,}" for part in parts]
    total = f"{sum(part.parameters or 0 for part in parts):,}"
    columns = [
        ["part", *(part.name for part in parts), "total"],
        [count.rjust(max(len(total), len("parameters"))) for count in ["parameters", *counts, total]],
        ["GiB", *_aligned([*(part.nbytes for part in parts), sum(part.nbytes for part in parts)])],
        ["stored as", *(", ".join(part.dtypes) for part in parts), ""],
    ]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]


def _aligned(sizes: list[int]) -> list[str]:
    """Sizes in GiB with their points below each other."""
    texts = [_gib(size) for size in sizes]
    width = max(len(text.partition(".")[0]) for text in texts)
    return [" " * (width - len(text.partition(".")[0])) + text for text in texts]


def _list(label: str, entries: tuple[str, ...]) -> list[str]:
    indent = " " * _INDENT
    shown = list(entries[:LISTED_NAMES]) or ["none"]
    if len(entries) > LISTED_NAMES:
        shown.append(f"and {len(entries) - LISTED_NAMES:,} more")
    return [(indent if position else label.ljust(_INDENT)) + entry for position, entry in enumerate(shown)]


def _gib(nbytes: int) -> str:
    """Four significant digits, so that a tiny checkpoint does not come out as 0."""
    if nbytes == 0:
        return "0"
    size = nbytes / 2**30
    return f"{size:.{max(0, 3 - math.floor(math.log10(size)))}f}"


def _in_words(number: int) -> str:
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f" ({number / unit:.4g} {word})"
    return ""
