"""Training checkpoints of Megatron-LM: tensor-, pipeline- and expert-parallel ranks as the Hub's tensors.

Both trees are read: the legacy one (`language_model.encoder`, dense models) and that of Megatron core (`decoder`,
dense and MoE models).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..configuration_skywork import SkyworkConfig, SkyworkMoeConfig
from ..headers import StoredTensor
from .layouts import MEGATRON, hub_shapes
from .readers import flat_tensors, load_pickle
from .recipes import Make, Product, Recipe, Source

WEIGHTS = "model_optim_rng.pt"
_NEWEST = "latest_checkpointed_iteration.txt"
# From this version on the rows of the fused queries, keys and values are ordered by group of heads.
_OLDEST_VERSION = 2.0
# Legacy names to those of Megatron core.
_LEGACY = (
    (r"^language_model/(encoder|transformer)/", "decoder."),
    (r"^language_model/embedding/word_embeddings/", "embedding.word_embeddings."),
    (r"^language_model/output_layer/", "output_layer."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(norm|layernorm)\.", ".pre_mlp_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
)
# Norms that core keeps inside the linear that follows them.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_IGNORED = ("_extra_state", "rotary_pos_emb.inv_freq", "rotary_emb.inv_freq")
_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "block_sparse_moe.gate.weight",
}
_QKV, _PROJECTION = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class _Rank:
    """One file's place in the three kinds of parallelism."""

    tensor: int
    pipeline: int
    expert: int


@dataclass
class _File:
    """What a rank's file holds: its tensors by core names, layers numbered within its stage."""

    path: Path
    args: Any
    tensors: dict[str, StoredTensor]
    ignored: list[StoredTensor]


def is_megatron(folder: Path) -> bool:
    return (folder / _NEWEST).is_file() or any(folder.glob("mp_rank_*"))


def read_megatron(folder: Path, config: SkyworkConfig | SkyworkMoeConfig | None = None) -> Source:
    """A checkpoint of Megatron-LM.

    Args:
        folder: of the run, whose newest iteration is taken, or of an iteration.
        config: of the model; None makes it of the arguments in the files.

    Raises:
        ValueError: a rank, layer or tensor is missing, or does not fit; the file or the tensor is named.
    """
    iteration = _iteration(folder)
    ranks = _ranks(iteration)
    files = {rank: _read(path) for rank, path in ranks.items()}
    first = files[min(files, key=lambda rank: (rank.pipeline, rank.tensor, rank.expert))]
    config = config or _config_of(first)
    merged = _Merger(files, config).recipes()
    ignored = [tensor for file in files.values() for tensor in file.ignored]
    beside = folder if (folder / "tokenizer.model").is_file() else iteration
    return Source(MEGATRON, beside, config, _checked(merged, config, iteration), ignored)


def _iteration(folder: Path) -> Path:
    newest = folder / _NEWEST
    if not newest.is_file():
        return folder
    number = newest.read_text().strip()
    found = folder / (number if number == "release" else f"iter_{int(number):07d}")
    if not found.is_dir():
        raise ValueError(f"{newest} names {found.name}, which is not there: copy it too, or give another iteration.")
    return found


def _ranks(iteration: Path) -> dict[_Rank, Path]:
    """The files by rank; checks that every combination is there."""
    folders = sorted(iteration.glob("mp_rank_*"))
    if not folders:
        raise ValueError(f"{iteration} holds no mp_rank_* folders: expected a checkpoint of Megatron-LM.")
    numbers = {folder: [int(part) for part in folder.name.removeprefix("mp_rank_").split("_")] for folder in folders}
    pipeline_parallel = _pipeline_parallel(folders[0] / WEIGHTS)
    ranks = {_rank(parts, pipeline_parallel): folder / WEIGHTS for folder, parts in numbers.items()}
    sizes = [1 + max(getattr(rank, kind) for rank in ranks) for kind in ("tensor", "pipeline", "expert")]
    for tensor in range(sizes[0]):
        for pipeline in range(sizes[1]):
            for expert in range(sizes[2]):
                if _Rank(tensor, pipeline, expert) not in ranks:
                    raise ValueError(
                        f"{iteration} has no folder of tensor rank {tensor}, pipeline rank {pipeline} and expert rank "
                        f"{expert}: expected {sizes[0]} x {sizes[1]} x {sizes[2]} folders; copy them all."
                    )
    return ranks


def _pipeline_parallel(file: Path) -> bool:
    return getattr(_content(file).get("args"), "pipeline_model_parallel_size", 1) > 1


def _rank(parts: list[int], pipeline_parallel: bool) -> _Rank:
    """`TT`, `TT_PPP`, `TT_EEE` or `TT_PPP_EEE`."""
    if len(parts) == 3:
        return _Rank(*parts)
    second = parts[1] if len(parts) == 2 else 0
    return _Rank(parts[0], second, 0) if pipeline_parallel else _Rank(parts[0], 0, second)


def _content(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is not there: copy it from where the checkpoint was written.")
    content = load_pickle(file, device="meta")
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{file} holds no `model`: expected a checkpoint of Megatron-LM.")
    return content


def _read(file: Path) -> _File:
    content = _content(file)
    version = content.get("checkpoint_version", 3.0)
    if version < _OLDEST_VERSION:
        raise ValueError(
            f"{file} is of checkpoint_version {version}, whose queries, keys and values are in another order: "
            f"expected {_OLDEST_VERSION} or later; load and save it with a newer Megatron-LM."
        )
    tensors: dict[str, StoredTensor] = {}
    ignored: list[StoredTensor] = []
    for path, value in flat_tensors(content["model"]):
        tensor = StoredTensor(file, f"model/{path}", value.dtype, tuple(value.shape))
        if path.endswith(_IGNORED):
            ignored.append(tensor)
        else:
            tensors[_core_name(path)] = tensor
    return _File(file, content.get("args"), tensors, ignored)


def _core_name(path: str) -> str:
    for pattern, name in _LEGACY:
        path = re.sub(pattern, name, path)
    for fused, name in _FUSED_NORMS.items():
        path = path.replace(fused, name)
    return path


def _config_of(file: _File) -> SkyworkConfig | SkyworkMoeConfig:
    """The config that the run's arguments describe."""
    args = vars(file.args) if file.args is not None else {}
    needed = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if args.get(name) is None]
    if missing:
        raise ValueError(
            f"The arguments in {file.path} lack {', '.join(missing)}: give the model's config.json with `config`."
        )
    fields = {
        "hidden_size": args["hidden_size"],
        "intermediate_size": args["ffn_hidden_size"],
        "num_hidden_layers": args["num_layers"],
        "num_attention_heads": args["num_attention_heads"],
        "num_key_value_heads": args["num_query_groups"] if args.get("group_query_attention") else None,
        "vocab_size": args["vocab_size"],
        "rms_norm_eps": args.get("norm_epsilon", args.get("layernorm_epsilon")),
        "rope_theta": args.get("rotary_base"),
        "max_position_embeddings": args.get("max_position_embeddings") or args.get("seq_length"),
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", True),
        "num_experts": args.get("num_experts"),
        "num_experts_per_tok": args.get("moe_router_topk") if args.get("num_experts") else None,
    }
    config_class = SkyworkMoeConfig if args.get("num_experts") else SkyworkConfig
    return config_class.from_dict({name: value for name, value in fields.items() if value is not None})


class _Merger:
    """Makes the Hub's tensors of those of all ranks."""

    def __init__(self, files: dict[_Rank, _File], config: Any) -> None:
        self.files, self.config = files, config
        self.stages = 1 + max(rank.pipeline for rank in files)
        self.tensor_ranks = 1 + max(rank.tensor for rank in files)
        self.expert_ranks = 1 + max(rank.expert for rank in files)

    def recipes(self) -> Iterator[Recipe]:
        layers_before = 0
        for stage in range(self.stages):
            names = self.files[_Rank(0, stage, 0)].tensors
            for name in names:
                yield from self._recipe(stage, name, layers_before)
            for expert_rank in range(1, self.expert_ranks):
                for name in self.files[_Rank(0, stage, expert_rank)].tensors:
                    if ".local_experts." in name:
                        yield from self._recipe(stage, name, layers_before, expert_rank)
            numbers = [int(match[1]) for match in map(_LAYER.match, names) if match]
            layers_before += 1 + max(numbers, default=-1)

    def _recipe(self, stage: int, name: str, layers_before: int, expert_rank: int = 0) -> Iterator[Recipe]:
        shards = [self._shard(_Rank(tensor, stage, expert_rank), name) for tensor in range(self.tensor_ranks)]
        if name in _OUTSIDE:
            if name == "output_layer.weight" and self.config.tie_word_embeddings:
                return
            yield self._outside(_OUTSIDE[name], shards)
            return
        match = _LAYER.match(name)
        if match is None:
            raise ValueError(f"{shards[0]} is unexpected: no part of a Skywork model is called so.")
        prefix = f"model.layers.{layers_before + int(match[1])}"
        yield self._of_layer(prefix, match[2], shards, expert_rank, stage)

    def _shard(self, rank: _Rank, name: str) -> StoredTensor:
        file = self.files[rank]
        first = self.files[replace(rank, tensor=0)].tensors[name]
        if name not in file.tensors:
            raise ValueError(f"{file.path} holds no `{name}`, which {first.file} has: it is of another run.")
        shard = file.tensors[name]
        if shard.shape != first.shape:
            raise ValueError(f"{shard} is {list(shard.shape)}, and {list(first.shape)} in {first.file}.")
        return shard

    def _outside(self, name: str, shards: list[StoredTensor]) -> Recipe:
        if name == "model.norm.weight":
            return _made([name], [shards[0].shape], shards[:1], _first)
        rows = self.config.vocab_size
        have = sum(shard.shape[0] for shard in shards)
        if have < rows:
            raise ValueError(f"{shards[0]} and its other ranks have {have} rows, and the config's vocabulary {rows}.")
        return _made([name], [(rows, shards[0].shape[1])], shards, partial(_rows, rows))

    def _of_layer(self, prefix: str, name: str, shards: list[StoredTensor], expert_rank: int, stage: int) -> Recipe:
        if name in _REPLICATED:
            return _made([f"{prefix}.{_REPLICATED[name]}"], [shards[0].shape], shards[:1], _first)
        if name == _QKV:
            return self._qkv(prefix, shards)
        if name == _PROJECTION:
            return _columns(f"{prefix}.self_attn.o_proj.weight", shards)
        if name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"):
            return _feed_forward(f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"), name, shards)
        if match := _EXPERT.fullmatch(name):
            number = expert_rank * self._local_experts(stage) + int(match[1])
            return _feed_forward(f"{prefix}.block_sparse_moe.experts.{number}", ("w1", "w3", "w2"), name, shards)
        raise ValueError(f"{shards[0]} is unexpected: no part of a Skywork layer is called so.")

    def _local_experts(self, stage: int) -> int:
        names = self.files[_Rank(0, stage, 0)].tensors
        return 1 + max(int(match[1]) for match in map(_EXPERT.search, names) if match)

    def _qkv(self, prefix: str, shards: list[StoredTensor]) -> Recipe:
        config = self.config
        head, hidden = config.hidden_size // config.num_attention_heads, shards[0].shape[1]
        keys = config.num_key_value_heads
        queries = config.num_attention_heads // keys
        rows = sum(shard.shape[0] for shard in shards)
        if rows != (config.num_attention_heads + 2 * keys) * head:
            raise ValueError(
                f"{shards[0]} and its other ranks have {rows} rows; the config's heads make "
                f"{(config.num_attention_heads + 2 * keys) * head}."
            )
        names = [f"{prefix}.self_attn.{part}_proj.weight" for part in "qkv"]
        shapes = [(config.num_attention_heads * head, hidden), (keys * head, hidden), (keys * head, hidden)]
        return _made(names, shapes, shards, partial(_split_qkv, queries, head))


def _made(names: list[str], shapes: Sequence[tuple[int, ...]], shards: list[StoredTensor], make: Make) -> Recipe:
    products = tuple(Product(name, shards[0].dtype, shape) for name, shape in zip(names, shapes, strict=True))
    return Recipe(products, tuple(shards), make)


def _columns(name: str, shards: list[StoredTensor]) -> Recipe:
    shape = (shards[0].shape[0], sum(shard.shape[1] for shard in shards))
    return _made([name], [shape], shards, _side_by_side)


def _feed_forward(prefix: str, names: tuple[str, str, str], part: str, shards: list[StoredTensor]) -> Recipe:
    """Gate and up from the first matrix, which has both above each other in each rank, or down from the second."""
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    if "linear_fc2" in part:
        return _columns(down, shards)
    shape = (sum(shard.shape[0] for shard in shards) // 2, shards[0].shape[1])
    return _made([gate, up], [shape, shape], shards, _split_gate_up)


def _first(shards: list[torch.Tensor]) -> list[torch.Tensor]:
    return shards[:1]


def _rows(count: int, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(shards)[:count]]


def _side_by_side(shards: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(shards, dim=1)]


def _split_gate_up(shards: list[torch.Tensor]) -> list[torch.Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[part] for half in halves]) for part in range(2)]


def _split_qkv(queries: int, head: int, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """[groups x (queries + key + value) x head, hidden] to the three, all groups below each other."""
    fused = torch.cat(shards)
    groups = fused.view(-1, queries + 2, head, fused.shape[1])
    return [part.reshape(-1, fused.shape[1]) for part in groups.split([queries, 1, 1], dim=1)]


def _checked(recipes: Iterator[Recipe], config: Any, folder: Path) -> list[Recipe]:
    """In the model's order, each tensor of the model once and of the right shape."""
    shapes = hub_shapes(config)
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    order = {name: place for place, name in enumerate(shapes)}
    made = list(recipes)
    for product in (product for recipe in made for product in recipe.products):
        if product.name not in shapes:
            raise ValueError(f"{folder} holds `{product.name}`, which a model of this config does not have.")
        if product.shape != shapes[product.name]:
            raise ValueError(
                f"`{product.name}` of {folder} is {list(product.shape)}; the config says {list(shapes[product.name])}."
            )
    names = {product.name for recipe in made for product in recipe.products}
    if missing := [name for name in shapes if name not in names]:
        raise ValueError(
            f"{folder} holds nothing for `{missing[0]}` and {len(missing) - 1} more tensors of the model."
        )
    return sorted(made, key=lambda recipe: order[recipe.products[0].name])
