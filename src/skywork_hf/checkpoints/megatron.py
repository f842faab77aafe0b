"""Training checkpoints of Megatron-LM as the Hub's layout would have them: ranks joined, fused matrices split.

Read are the legacy tree (`language_model`, dense models) and that of Megatron-Core (dense models and MoE), one
`model_optim_rng.pt` for each rank of tensor, pipeline and expert parallelism.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..configuration_skywork import SkyworkConfig, SkyworkMoeConfig
from ..headers import StoredTensor, stored_tensor
from ..readers import flat_tensors, load_pickle
from ..untrusted import check_file, naming
from .layouts import MEGATRON, config_of, hub_shapes
from .recipes import Make, Product, Recipe, Source

logger = logging.get_logger(__name__)

LATEST_FILE = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
# The first whose query_key_value rows are grouped by head; those before interleave them otherwise.
_OLDEST_VERSION = 2.0

_EMBEDDING, _HEAD, _FINAL_NORM = "embedding", "head", "final norm"
_INPUT_NORM, _QKV, _ATTENTION_OUTPUT = "input norm", "fused qkv", "attention output"
_MLP_NORM, _FC1, _FC2, _ROUTER = "feed-forward norm", "fc1", "fc2", "router"
_WHOLE_IN_EACH_RANK = (_INPUT_NORM, _MLP_NORM, _FINAL_NORM, _ROUTER)
# Names in the files, with dots between all keys, by what they mean; `word_embeddings_for_head` is the copy of tied
# embeddings that the last stage has.
_MODEL_NAMES = {
    _EMBEDDING: ("language_model.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    _HEAD: ("language_model.output_layer.weight", "output_layer.weight", "word_embeddings_for_head.weight"),
}
_DECODERS = ("language_model.encoder.", "language_model.transformer.", "decoder.")
_FINAL_NORM_NAMES = ("final_norm.weight", "final_layernorm.weight")
_LAYER_NAMES = {
    _INPUT_NORM: (
        "input_norm.weight",
        "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight",
    ),
    _QKV: (
        "self_attention.query_key_value.weight",
        "attention.query_key_value.weight",
        "self_attention.linear_qkv.weight",
    ),
    _ATTENTION_OUTPUT: (
        "self_attention.dense.weight",
        "attention.dense.weight",
        "self_attention.linear_proj.weight",
    ),
    _MLP_NORM: (
        "post_attention_norm.weight",
        "post_attention_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
    ),
    _FC1: ("mlp.dense_h_to_4h.weight", "mlp.linear_fc1.weight"),
    _FC2: ("mlp.dense_4h_to_h.weight", "mlp.linear_fc2.weight"),
    _ROUTER: ("mlp.router.weight",),
}
_EXPERT_NAMES = {_FC1: ("linear_fc1.weight",), _FC2: ("linear_fc2.weight",)}
# Beginnings of the names above, and what can be told by the names with them; "*" is a number.
_PART_OF = {
    f"{beginning}{name}": part
    for beginnings, names_of_parts in (
        (("",), _MODEL_NAMES),
        (_DECODERS, {_FINAL_NORM: _FINAL_NORM_NAMES}),
        ([f"{decoder}layers.*." for decoder in _DECODERS], _LAYER_NAMES),
        ([f"{decoder}layers.*.mlp.experts.local_experts.*." for decoder in _DECODERS], _EXPERT_NAMES),
    )
    for part, names in names_of_parts.items()
    for name in names
    for beginning in beginnings
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_IGNORED = re.compile(r"_extra_state$|rotary_pos_emb\.|rotary_emb\.|inv_freq$")

# Arguments that leave no trace in the tensors, and what they may be; where one is a list, what its members may be.
_TRACELESS = {
    "normalization": ("RMSNorm", "rmsnorm"),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "swiglu": (True,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    # A table of learned positions would be an unexpected tensor; older files say so beside rotary ones.
    "position_embedding_type": ("rope", "learned_absolute"),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_base_per_layer": (None,),
    "use_rope_scaling": (False,),
    "no_rope_freq": (None, 0),
    "window_size": (None, (-1, -1), (-1, 0)),  # -1 is no end
    "qk_l2_norm": (False,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "use_mup": (False,),
}
# Those of runs with experts; in others they have no effect. Skywork's gate weighs the chosen experts by the softmax of
# their logits, which is Megatron-LM's softmax after the choice: the one before it (`pre_softmax`) does not sum to 1.
_TRACELESS_OF_EXPERTS = {
    "moe_router_score_function": ("softmax",),
    "moe_router_pre_softmax": (False,),
    "moe_router_topk_scaling_factor": (1.0,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_apply_probs_on_input": (False,),
    "activation_func_clamp_value": (None,),
    # All but Sinkhorn's only add to the loss.
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
}
_PARALLEL_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
# Arguments that are integers above 0, and numbers above 0.
_COUNTS = (
    *_PARALLEL_SIZES,
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "max_position_embeddings",
    "seq_length",
    "vocab_size",
    "moe_router_topk",
    "num_experts",
)
_AMOUNTS = ("norm_epsilon", "layernorm_epsilon", "rotary_base", "rotary_seq_len_interpolation_factor")
_MOST = 1e18  # what is above overflows
# Others that are read, and what they and those without a trace may be before they are compared.
_CHOICES = ("group_query_attention", "untie_embeddings_and_output_weights", "params_dtype")
_PLAIN = (type(None), bool, int, float, str, torch.dtype)
# Fields of a config, by the arguments that they are made of, the first that is there.
_NEEDED = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("ffn_hidden_size",),
    "num_hidden_layers": ("num_layers",),
    "num_attention_heads": ("num_attention_heads",),
    "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
    "vocab_size": ("vocab_size",),
}
# Those that tensors show.
_SHAPED = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


class _Key(NamedTuple):
    """What a tensor is: its part, the layer and the expert, numbered as in its rank or, once merged, in the model."""

    part: str
    layer: int | None = None
    expert: int | None = None


class _Sizes(NamedTuple):
    """The number of tensor-, pipeline- and expert-parallel ranks."""

    tensor: int
    pipeline: int
    expert: int

    def folder(self, tensor: int, stage: int, expert: int) -> str:
        """The name of a rank's folder."""
        name = f"mp_rank_{tensor:02d}"
        if self.pipeline > 1:
            name += f"_{stage:03d}"
        return f"{name}_{expert:03d}" if self.expert > 1 else name


@dataclass(frozen=True)
class _Rank:
    """One rank's file.

    Args:
        file: where it is.
        args: the arguments of the run.
        iteration: the step that it was written after.
        tensors: those of the model, by what they are.
        ignored: those that nothing is made of.
    """

    file: Path
    args: Namespace
    iteration: Any
    tensors: dict[_Key, StoredTensor]
    ignored: list[StoredTensor]

    @property
    def sizes(self) -> _Sizes:
        return _Sizes(*(getattr(self.args, kind, None) or 1 for kind in _PARALLEL_SIZES))


_Ranks = dict[tuple[int, int, int], _Rank]
# Of a tensor its slices, in order; of each slice the copies that ranks have of it, of which the first counts.
_Slices = tuple[tuple[StoredTensor, ...], ...]
_Shards = dict[_Key, _Slices]


def is_megatron(folder: Path) -> bool:
    """Whether this is a folder of a Megatron-LM run, of one of its iterations, or of one rank."""
    signs = (LATEST_FILE, RANK_FILE, "mp_rank_*", "iter_*/mp_rank_*")
    return any(next(folder.glob(sign), None) for sign in signs)


def read_megatron(folder: Path, config: SkyworkConfig | SkyworkMoeConfig | None = None) -> Source:
    """Find out what a checkpoint of Megatron-LM holds, and that it is whole. Reads no weights.

    Args:
        folder: of a run, whose latest or only iteration is taken, or of an iteration.
        config: what the run's own arguments do not say; None makes one of these. They know nothing of Skywork-MoE's
            gate, which then has the defaults of `SkyworkMoeConfig`.

    Raises:
        ValueError: a rank or a tensor is missing, unexpected or of a wrong shape, the format is another one, or the
            arguments say too little, something impossible, another model than Skywork's, or other than `config`.
            Names the file and the tensor, argument or field.
    """
    ranks = _read_ranks(_iteration_folder(folder))
    for rank in ranks.values():
        _check_arguments(rank)
    first = next(iter(ranks.values()))
    shards = _merged(ranks, first.sizes)
    config = _config_of_arguments(first, shards) if config is None else _checked_config(config, first)
    ignored = [tensor for rank in ranks.values() for tensor in rank.ignored]
    if config.tie_word_embeddings:
        ignored += [copy for copies in shards.pop(_Key(_HEAD), ()) for copy in copies]
    return Source(MEGATRON, folder, config, _recipes(config, shards, first), ignored)


# --- the files of the ranks


def _iteration_folder(folder: Path) -> Path:
    if (folder / RANK_FILE).exists():
        raise ValueError(
            f"{folder} holds one rank of a checkpoint: give {folder.absolute().parent}, with all of them."
        )
    latest = folder / LATEST_FILE
    if not latest.exists():
        return _only_iteration(folder)
    with check_file(latest).open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(40).strip()
    if text != "release" and not text.isdecimal():
        raise ValueError(f"{latest} says {text!r}: expected the number of an iteration, or `release`.")
    iteration = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not iteration.is_dir():
        raise ValueError(f"{latest} names {iteration.name}, which is not there: copy it, or give another iteration.")
    return iteration


def _only_iteration(folder: Path) -> Path:
    """The iteration in a run's folder that does not say which is the latest; any other folder is one itself."""
    iterations = sorted({ranks.parent for ranks in folder.glob("iter_*/mp_rank_*")})
    if len(iterations) > 1:
        raise ValueError(
            f"{folder} has no {LATEST_FILE} and {len(iterations)} iterations: give one, such as {iterations[-1]}."
        )
    return iterations[0] if iterations else folder


def _read_ranks(folder: Path) -> _Ranks:
    found = sorted(entry.name for entry in folder.glob("mp_rank_*") if entry.is_dir())
    if not found:
        raise ValueError(
            f"{folder} has no mp_rank_* folders: expected those of Megatron-LM's `--ckpt-format torch`; distributed "
            "checkpoints (.distcp) have to be saved again by Megatron-LM in that format."
        )
    first = _read_rank(folder / found[0] / RANK_FILE)
    sizes = first.sizes
    most = len(found) + 1  # of more than there are, one is missing
    tensor, pipeline, expert = (range(min(size, most)) for size in sizes)
    everything = islice(product(tensor, pipeline, expert), most)
    places = {place: sizes.folder(*place) for place in everything}
    if len(places) <= len(found) and (extra := [name for name in found if name not in places.values()]):
        raise ValueError(f"{folder / extra[0]} is not among the ranks that {first.file} names: {_sizes_text(sizes)}.")
    ranks: _Ranks = {}
    for place, name in places.items():
        ranks[place] = _read_rank(folder / name / RANK_FILE, sizes)
        _check_same_run(ranks[place], first)
    return ranks


def _sizes_text(sizes: _Sizes) -> str:
    return f"{sizes.tensor} tensor-parallel x {sizes.pipeline} pipeline-parallel x {sizes.expert} expert-parallel"


def _read_rank(file: Path, sizes: _Sizes | None = None) -> _Rank:
    if not file.exists():
        expected = f"expected one for each of {_sizes_text(sizes)} ranks" if sizes else "expected one for each rank"
        raise ValueError(f"{file} is missing: {expected}; copy it from where the checkpoint was written.")
    content = load_pickle(file)
    if not isinstance(content, dict) or not isinstance(content.get("args"), Namespace):
        raise ValueError(f"{file} holds no `args` with the run's arguments: expected a file of Megatron-LM.")
    model = content.get("model")
    if not isinstance(model, dict):
        virtual = " (interleaved pipeline stages, `model0`, are not read)" if "model0" in content else ""
        raise ValueError(f"{file} holds no `model` with named tensors{virtual}: save it again by Megatron-LM.")
    _check_numbers(file, content["args"])
    _check_version(file, content.get("checkpoint_version"), legacy="language_model" in model)
    stored = [stored_tensor(file, f"model/{name}", value) for name, value in flat_tensors(model)]
    ignored = [tensor for tensor in stored if _IGNORED.search(tensor.name)]
    tensors = _by_key([tensor for tensor in stored if not _IGNORED.search(tensor.name)])
    return _Rank(file, content["args"], content.get("iteration"), tensors, ignored)


def _check_numbers(file: Path, args: Namespace) -> None:
    for name in (*_COUNTS, *_AMOUNTS):
        value = getattr(args, name, None)
        kinds, expected = ((int,), "an integer") if name in _COUNTS else ((int, float), "a number")
        if value is not None and not (type(value) in kinds and 0 < value < _MOST):
            raise ValueError(
                f"{file} has the argument {name}={value!r}: expected {expected} above 0 and below {_MOST:.0e}; copy "
                "the file again from where the checkpoint was written."
            )
    for name in {*_TRACELESS, *_TRACELESS_OF_EXPERTS, *_CHOICES} & vars(args).keys():
        value = getattr(args, name)
        if not all(type(one) in _PLAIN for one in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(
                f"{file} has the argument {name} of type {type(value).__name__}: expected a number, a text or a list "
                "of them; copy the file again from where the checkpoint was written."
            )


def _check_version(file: Path, version: Any, legacy: bool) -> None:
    if version is None:
        version = 0.0 if legacy else 3.0  # as Megatron-LM takes them
    if not isinstance(version, int | float) or version < _OLDEST_VERSION:
        raise ValueError(
            f"{file} has checkpoint_version {version}, whose query_key_value rows are in another order: expected "
            f"{_OLDEST_VERSION} or later; load it and save it again with a newer Megatron-LM."
        )


def _by_key(tensors: list[StoredTensor]) -> dict[_Key, StoredTensor]:
    found: dict[_Key, StoredTensor] = {}
    for tensor in tensors:
        key = _key_of(tensor)
        if key is None:
            raise ValueError(
                f"{tensor} is unexpected: a Skywork model has {_spelled(_MODEL_NAMES)}, a final norm, and in each "
                f"layer {_spelled(_LAYER_NAMES)}, or experts.local_experts; nothing else of the model can be dropped."
            )
        if key in found:
            raise ValueError(f"{tensor} and `{found[key].name}` are both the {key.part}: expected one of them.")
        found[key] = tensor
    return found


def _spelled(names: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{part} ({spellings[-1]})" for part, spellings in names.items())


def _key_of(tensor: StoredTensor) -> _Key | None:
    name = tensor.name.removeprefix("model/").replace("/", ".")
    part = _PART_OF.get(_NUMBER.sub("*", name))
    return None if part is None else _Key(part, *map(int, _NUMBER.findall(name)))


# --- ranks that fit each other


def _check_same_run(rank: _Rank, first: _Rank) -> None:
    if (rank.sizes, rank.iteration) != (first.sizes, first.iteration):
        raise ValueError(
            f"{rank.file} is of iteration {rank.iteration} of a run with {_sizes_text(rank.sizes)} ranks, and "
            f"{first.file} of iteration {first.iteration} with {_sizes_text(first.sizes)}: take all of one."
        )


def _check_alike(rank: _Rank, first: _Rank) -> None:
    """Check that two ranks of a stage hold the same tensors, each its own slice."""
    for key in {**first.tensors, **rank.tensors}:
        one, other = first.tensors.get(key), rank.tensors.get(key)
        if one is None or other is None:
            present, lacking = (one or other), (rank if one else first)
            raise ValueError(
                f"{lacking.file} has no counterpart of {present}: expected the same tensors in all ranks of a stage; "
                "copy it again."
            )
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{other} is {_described(other)}, and {_described(one)} in {first.file}: expected the same in all "
                "ranks of a stage; take them of one run."
            )


def _described(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _merged(ranks: _Ranks, sizes: _Sizes) -> _Shards:
    """The slices of each tensor, with layers and experts numbered as in the model."""
    merged: _Shards = {}
    layers_before = 0
    for stage in range(sizes.pipeline):
        members = {(tensor, expert): ranks[tensor, stage, expert] for tensor, _, expert in ranks}
        for member in members.values():
            _check_alike(member, members[0, 0])
        for key, slices in _stage_slices(members, sizes, layers_before):
            if key in merged:
                raise ValueError(
                    f"{slices[0][0]} is in an earlier stage too: {merged[key][0][0]}; expected one of them."
                )
            merged[key] = slices
        layers_before += _count(key.layer for key in members[0, 0].tensors)
    return merged


def _stage_slices(
    members: dict[tuple[int, int], _Rank], sizes: _Sizes, layers_before: int
) -> Iterator[tuple[_Key, _Slices]]:
    local_experts = _count(key.expert for key in members[0, 0].tensors)
    for key in members[0, 0].tensors:
        layer = None if key.layer is None else key.layer + layers_before
        if key.expert is None:  # all expert-parallel ranks have it
            yield _Key(key.part, layer), _slices_in(members, key, range(sizes.expert), sizes)
            continue
        for rank in range(sizes.expert):
            expert = key.expert + rank * local_experts
            yield _Key(key.part, layer, expert), _slices_in(members, key, [rank], sizes)


def _slices_in(
    members: dict[tuple[int, int], _Rank], key: _Key, expert_ranks: Iterable[int], sizes: _Sizes
) -> _Slices:
    slices = [[members[tensor, rank].tensors[key] for rank in expert_ranks] for tensor in range(sizes.tensor)]
    if key.part in _WHOLE_IN_EACH_RANK:
        slices = [[copy for copies in slices for copy in copies]]
    return tuple(map(tuple, slices))


def _count(numbers: Iterator[int | None]) -> int:
    return 1 + max((number for number in numbers if number is not None), default=-1)


# --- the config


def _check_arguments(rank: _Rank) -> None:
    """
    Raises:
        ValueError: the model computes something that no Skywork model does, and its tensors would not show it.
    """
    experts = getattr(rank.args, "num_experts", None)
    for name, allowed in {**_TRACELESS, **(_TRACELESS_OF_EXPERTS if experts else {})}.items():
        value = getattr(rank.args, name, None)
        values = value if isinstance(value, list) else [value]
        if any(one is not None and one not in allowed for one in values):
            raise ValueError(
                f"{rank.file} was trained with {name}={value!r}, and a Skywork model has {allowed[0]!r}: it cannot be "
                "converted."
            )


def _needed(args: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """`_NEEDED`, and what else these arguments have to say."""
    of_experts = {"num_experts_per_tok": ("moe_router_topk",)} if args.get("num_experts") else {}
    heads = "num_query_groups" if args.get("group_query_attention") else "num_attention_heads"
    return {**_NEEDED, "num_key_value_heads": (heads,), **of_experts}


def _checked_config(config: SkyworkConfig | SkyworkMoeConfig, rank: _Rank) -> SkyworkConfig | SkyworkMoeConfig:
    """The config that was given, for experts in one module each; refused where the shapes would not tell."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("The config has a `quantization_config`, and Megatron-LM's weights are plain: remove it.")
    for field, said in _traceless_fields(_arguments(rank)).items():
        given = getattr(config, field, said)  # a dense config has fewer; experts are counted later
        if not _agree(field, given, said):
            raise ValueError(
                f"The config's `{field}` is {given}, and {rank.file} was trained with {said}: take the config.json of "
                "this model."
            )
    return config_of(config.to_dict())


def _agree(field: str, given: Any, said: Any) -> bool:
    if field == "max_position_embeddings":
        return given >= said  # rotary positions have no table, and contexts are extended so
    if field == "hidden_act":
        return given in ("silu", "swish")  # one function
    return given == said


def _traceless_fields(args: dict[str, Any]) -> dict[str, Any]:
    """Of the fields that no shape tells, those that the arguments say."""
    fields = {field: _first(args, names) for field, names in _needed(args).items() if field not in _SHAPED}
    fields["hidden_act"] = "silu" if args.get("swiglu") else None
    if "untie_embeddings_and_output_weights" in args:
        fields["tie_word_embeddings"] = not args["untie_embeddings_and_output_weights"]
    if "rotary_base" in args or "rotary_seq_len_interpolation_factor" in args:
        fields["rope_parameters"] = SkyworkConfig(**_rope_fields(args)).rope_parameters
    return {field: value for field, value in fields.items() if value is not None}


def _arguments(rank: _Rank) -> dict[str, Any]:
    return {name: value for name, value in vars(rank.args).items() if value is not None}


def _first(args: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((args[name] for name in names if name in args), None)


def _config_of_arguments(rank: _Rank, shards: _Shards) -> SkyworkConfig | SkyworkMoeConfig:
    args = _arguments(rank)
    needed = _needed(args)
    raw = {field: _first(args, names) for field, names in needed.items()}
    if lacking := dict.fromkeys(" or ".join(names) for field, names in needed.items() if raw[field] is None):
        raise ValueError(
            f"The arguments in {rank.file} lack {', '.join(lacking)}: put a config.json of the model that says it "
            "beside the folders, or pass it as --config."
        )
    embedding = shards.get(_Key(_EMBEDDING))
    raw["dtype"] = args.get("params_dtype") or (embedding[0][0].dtype if embedding else None)
    raw |= _rope_fields(args)
    raw["tie_word_embeddings"] = not args.get("untie_embeddings_and_output_weights", _Key(_HEAD) in shards)
    raw |= _expert_fields(args.get("num_experts"), shards)
    with naming(rank.file):
        return SkyworkConfig.from_dict(raw)


def _rope_fields(args: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_theta": float(args.get("rotary_base", 10000.0))}
    factor = float(args.get("rotary_seq_len_interpolation_factor", 1.0))
    if factor != 1.0:
        fields["rope_scaling"] = {"type": "linear", "factor": factor}
    return fields


def _expert_fields(experts: Any, shards: _Shards) -> dict[str, Any]:
    if not experts:
        return {}
    with_experts = [key.layer for key in shards if key.part == _ROUTER and key.layer is not None]
    return {"num_experts": experts, "moe_expert_interval": 1 + min(with_experts, default=0)}


# --- recipes


def _recipes(config: SkyworkConfig | SkyworkMoeConfig, shards: _Shards, first: _Rank) -> list[Recipe]:
    """One recipe for each group of the model's tensors, in the model's order; checks that nothing is left over."""
    shapes = hub_shapes(config)
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    plan = dict(_plan(config))
    _check_plan(plan, shapes)
    _check_counts(config, shards, first)
    shapes_of_slices = _slice_shapes(config, first)
    recipes = []
    for key, names in plan.items():
        if key not in shards:
            raise ValueError(_missing_text(key, names[0], first))
        _check_slices(key, shards[key], shapes_of_slices, config)
        dtype = shards[key][0][0].dtype
        products = tuple(Product(name, dtype, shapes[name]) for name in names)
        recipes.append(_recipe(key.part, products, shards[key], config))
    if extra := [key for key in shards if key not in plan]:
        raise ValueError(
            f"{shards[extra[0]][0][0]} is unexpected: the config has no {_key_text(extra[0])}; take the config.json "
            "of this model."
        )
    places = {name: place for place, name in enumerate(shapes)}
    return sorted(recipes, key=lambda recipe: min(places[made.name] for made in recipe.products))


def _plan(config: SkyworkConfig | SkyworkMoeConfig) -> Iterator[tuple[_Key, tuple[str, ...]]]:
    """What the Hub's tensors are made of: the key of the shards, and the names of what they become."""
    yield _Key(_EMBEDDING), ("model.embed_tokens.weight",)
    for layer in range(config.num_hidden_layers):
        hub = f"model.layers.{layer}"
        yield _Key(_INPUT_NORM, layer), (f"{hub}.input_layernorm.weight",)
        yield _Key(_QKV, layer), tuple(f"{hub}.self_attn.{part}_proj.weight" for part in "qkv")
        yield _Key(_ATTENTION_OUTPUT, layer), (f"{hub}.self_attn.o_proj.weight",)
        yield _Key(_MLP_NORM, layer), (f"{hub}.post_attention_layernorm.weight",)
        if isinstance(config, SkyworkMoeConfig) and config.is_moe_layer(layer):
            yield from _experts_plan(layer, f"{hub}.block_sparse_moe", config.num_local_experts)
        else:
            yield _Key(_FC1, layer), (f"{hub}.mlp.gate_proj.weight", f"{hub}.mlp.up_proj.weight")
            yield _Key(_FC2, layer), (f"{hub}.mlp.down_proj.weight",)
    yield _Key(_FINAL_NORM), ("model.norm.weight",)
    if not config.tie_word_embeddings:
        yield _Key(_HEAD), ("lm_head.weight",)


def _experts_plan(layer: int, hub: str, experts: int) -> Iterator[tuple[_Key, tuple[str, ...]]]:
    yield _Key(_ROUTER, layer), (f"{hub}.gate.weight",)
    for expert in range(experts):
        yield _Key(_FC1, layer, expert), (f"{hub}.experts.{expert}.w1.weight", f"{hub}.experts.{expert}.w3.weight")
        yield _Key(_FC2, layer, expert), (f"{hub}.experts.{expert}.w2.weight",)


def _check_plan(plan: dict[_Key, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
    planned = {name for names in plan.values() for name in names}
    for name in shapes:
        if name not in planned:
            raise ValueError(
                f"The config asks for `{name}`, which no checkpoint of Megatron-LM holds: a language model with a "
                "gate of one matrix (`moe_2layer_gate` false) is read."
            )


def _check_counts(config: SkyworkConfig | SkyworkMoeConfig, shards: _Shards, first: _Rank) -> None:
    found = {"layers": _count(key.layer for key in shards), "experts": _count(key.expert for key in shards)}
    expected = {"layers": config.num_hidden_layers, "experts": getattr(config, "num_local_experts", 0)}
    for what, number in found.items():
        if number != expected[what]:
            raise ValueError(
                f"The ranks in {first.file.parent.parent} hold {number} {what}, and the config says "
                f"{expected[what]}: copy what is missing, or take the config.json of this model."
            )


def _missing_text(key: _Key, name: str, first: _Rank) -> str:
    spellings = {**_MODEL_NAMES, **_LAYER_NAMES, _FINAL_NORM: _FINAL_NORM_NAMES}[key.part]
    expected = (_EXPERT_NAMES if key.expert is not None else {key.part: spellings})[key.part]
    return (
        f"No rank in {first.file.parent.parent} holds the {_key_text(key)}, which `{name}` is made of: expected a key "
        f"that ends in {' or '.join(expected)}; copy the checkpoint again, or take the config.json of this model."
    )


def _key_text(key: _Key) -> str:
    layer = "" if key.layer is None else f" of layer {key.layer}"
    return key.part + (layer if key.expert is None else f" of expert {key.expert}{layer}")


def _slice_shapes(config: Any, first: _Rank) -> dict[str, tuple[int, ...]]:
    """What one tensor-parallel rank holds of each part of a layer."""
    ranks, hidden, width = first.sizes.tensor, config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for field, number in (("num_key_value_heads", kv_heads), ("intermediate_size", width)):
        if number % ranks:
            raise ValueError(
                f"{first.file} is of {ranks} tensor-parallel ranks, which do not divide the config's `{field}`="
                f"{number}: take the config.json of this model."
            )
    return {
        _QKV: ((heads + 2 * kv_heads) * head_dim // ranks, hidden),
        _ATTENTION_OUTPUT: (hidden, heads * head_dim // ranks),
        _FC1: (2 * width // ranks, hidden),
        _FC2: (hidden, width // ranks),
        _ROUTER: (getattr(config, "num_local_experts", 0), hidden),
        **dict.fromkeys((_INPUT_NORM, _MLP_NORM, _FINAL_NORM), (hidden,)),
    }


def _check_slices(
    key: _Key, slices: _Slices, shapes: dict[str, tuple[int, ...]], config: SkyworkConfig | SkyworkMoeConfig
) -> None:
    first = slices[0][0]
    if key.part in shapes:
        fits, expected = first.shape == shapes[key.part], str(list(shapes[key.part]))
    else:
        rows = first.shape[0] * len(slices)
        fits = first.shape[1:] == (config.hidden_size,) and rows >= config.vocab_size
        expected = f"{config.hidden_size} columns and at least {config.vocab_size} rows in all ranks"
    if not fits:
        raise ValueError(
            f"{first} is {list(first.shape)}; for the config it would be {expected} ({len(slices)} tensor-parallel "
            "ranks): take the config.json of this model."
        )


def _recipe(part: str, products: tuple[Product, ...], slices: _Slices, config: Any) -> Recipe:
    makes: dict[str, Make | None] = {
        _QKV: partial(_split_qkv, config.num_key_value_heads, config.head_dim),
        _FC1: _split_gate_up,
        _FC2: _join_columns,
        _ATTENTION_OUTPUT: _join_columns,
        **dict.fromkeys(_WHOLE_IN_EACH_RANK),
    }
    make = makes.get(part, partial(_join_rows, config.vocab_size))
    sources = tuple(copy for copies in slices for copy in copies)
    if len(sources) > len(slices):
        make = partial(_make_of_copies, slices, make)
    return Recipe(products, sources, make)


def _make_of_copies(slices: _Slices, make: Make | None, sources: list[torch.Tensor]) -> list[torch.Tensor]:
    """Make it of the first copy of each slice, as Megatron-LM's own tools do; a warning says where others differ."""
    values, firsts = iter(sources), []
    for first, *others in slices:
        firsts.append(next(values))
        for other in others:
            if not torch.equal(firsts[-1], next(values)):
                logger.warning_once(
                    f"{first} and its copy in {other.file} are not equal, as they should be: the former is taken."
                )
    return firsts if make is None else make(firsts)


def _join_rows(rows: int, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """All ranks' rows below each other, without the padding."""
    return [torch.cat(shards)[:rows]]


def _join_columns(shards: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(shards, dim=1)]


def _split_qkv(kv_heads: int, head_dim: int, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values; the rows are, for each key/value head, its queries, its key and its value."""
    fused = torch.cat(shards)
    groups = fused.view(kv_heads, -1, fused.shape[1])
    parts = groups.split([groups.shape[1] - 2 * head_dim, head_dim, head_dim], dim=1)
    return [part.reshape(-1, fused.shape[1]) for part in parts]


def _split_gate_up(shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gate and up projection; each rank has its rows of the one above its rows of the other."""
    gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
    return [torch.cat(gates), torch.cat(ups)]
