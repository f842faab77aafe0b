"""What training adapters (LoRA, QLoRA) takes, in bytes: the placement's parts, with what training adds to each."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..placement.attempt import place
from ..placement.devices import GIB, Device, devices_of
from ..placement.plan import request_of
from ..placement.problem import Placement, Request
from ..placement.sizes import LayerParts, ModelParts, Part

# AdamW's two moving averages, each in the dtype of its parameter.
_ADAMW_STATES = 2
# What a parameter is in the copy that autocast makes of it for a forward pass.
_AUTOCAST_ITEMSIZE = 2
# float32's.
_FLOAT = 4
# Bytes of one logit while the loss is differentiated: itself, its log-softmax, and the gradients of both, in float32.
_LOGIT = 4 * _FLOAT
_BOUNDLESS = Device(0, "", 2**60)


@dataclass(frozen=True)
class Adapters:
    """Trained parameters: how many, and their bytes."""

    count: int
    nbytes: int

    @property
    def training_bytes(self) -> int:
        """The parameters, their gradients, AdamW's states and autocast's copy."""
        return (2 + _ADAMW_STATES) * self.nbytes + _AUTOCAST_ITEMSIZE * self.count


@dataclass
class TrainingParts(ModelParts):
    """A model's parts while adapters of its linears are trained; each part's `plain` has its adapters' bytes too.

    The sizes below, in bytes a token, have h for `hidden_size`, f for `intermediate_size`, k for the experts of a
    token, r for the rank and i for the bytes of the model's dtype, and are upper bounds: every linear is taken for an
    adapted one, and dropout for one that masks.

    Args:
        rank: the largest of the adapters.
        gradient_checkpointing: whether layers are computed again in the backward pass, and only their inputs kept.
    """

    rank: int
    gradient_checkpointing: bool

    def kv_bytes(self, tokens: int, batch: int) -> int:
        """What the forward pass keeps of a layer, in the place of a cache: its input and rotary tables,
        (h + 2 head_dim) i; all that its backward pass needs, where nothing is computed again."""
        config = self.config
        kept = (config.hidden_size + 2 * self.head_dim) * self.itemsize
        if not self.gradient_checkpointing:
            kept += self._attention_keeps + self._routing_keeps + self._rows * self._mlp_keeps
        return tokens * kept

    def dense_working_bytes(self, tokens: int, batch: int) -> int:
        """What a layer's backward pass, or the loss, takes on the layer's device beyond `expert_working_bytes`.

        The loss comes before any layer's backward pass, and the transients of attention, of routing and of the
        feed-forward part one after another: so of each the larger counts."""
        config = self.config
        transients = max(self._attention_works, self._routing_works, self._mlp_works) - self._mlp_works
        layer = tokens * (self._attention_keeps + self._routing_keeps + transients)
        loss = tokens * config.vocab_size * _LOGIT
        return max(layer, loss - self.expert_working_bytes(tokens))

    def expert_working_bytes(self, tokens: int) -> int:
        """What one layer's feed-forward part takes in the backward pass on a device that may get all k rows of every
        token, one expert after another, beside `unpacking_bytes`."""
        return tokens * (self._rows * self._mlp_keeps + self._mlp_works)

    @property
    def _rows(self) -> int:
        return max(1, self._top_k)

    @property
    def _top_k(self) -> int:
        return getattr(self.config, "num_experts_per_tok", 0)

    def _linears_keep(self, *inputs: int) -> int:
        """Of each adapted linear with so many inputs: these in float32, dropout's mask, and what A makes of them."""
        return sum((_FLOAT + 1) * size + _FLOAT * self.rank for size in inputs)

    def _linear_works(self, inputs: int, outputs: int) -> int:
        """The transient of one adapted linear: of its inputs and of its outputs three in float32, and two in the
        model's dtype."""
        return (inputs + outputs) * (3 * _FLOAT + 2 * self.itemsize)

    @property
    def _attention_keeps(self) -> int:
        """The inputs of two norms in float32, the linears' (4 h), queries, keys, values and outputs with copies and
        the norms' outputs (9 h i); no square matrix, but one number a head, at most h in all."""
        hidden = self.config.hidden_size
        return (2 * _FLOAT + 1) * hidden + self._linears_keep(*[hidden] * 4) + 9 * hidden * self.itemsize

    @property
    def _attention_works(self) -> int:
        """Gradients of queries, keys, values and outputs, before and after the rotary embedding, one in float32."""
        hidden = self.config.hidden_size
        return (8 * self.itemsize + _FLOAT) * hidden + self._linear_works(hidden, hidden)

    @property
    def _routing_keeps(self) -> int:
        """The k rows, and the experts' outputs."""
        return 2 * self._top_k * self.config.hidden_size * self.itemsize

    @property
    def _routing_works(self) -> int:
        """Their gradients, and four times the weighted rows in float32."""
        return self._top_k * self.config.hidden_size * (2 * self.itemsize + 4 * _FLOAT)

    @property
    def _mlp_keeps(self) -> int:
        """A row's input and output, four intermediates, and the inputs of the three linears."""
        hidden, wide = self.config.hidden_size, self.config.intermediate_size
        return (2 * hidden + 4 * wide) * self.itemsize + self._linears_keep(hidden, hidden, wide)

    @property
    def _mlp_works(self) -> int:
        """A row's gradients of three intermediates and of the input."""
        hidden, wide = self.config.hidden_size, self.config.intermediate_size
        return (hidden + 3 * wide) * self.itemsize + self._linear_works(hidden, wide)


@dataclass(frozen=True)
class FinetuningMemory:
    """What training adapters takes.

    Args:
        request: the model, its precision and the sequences.
        parts: what the planner places.
        adapters: the trained parameters in each of the modules that it places.
    """

    request: Request
    parts: TrainingParts
    adapters: dict[str, Adapters]

    def with_quantization(self, quantization: Any) -> FinetuningMemory:
        """The same, with other frozen weights."""
        request = replace(self.request, quantization=quantization)
        parts = _training_parts(request, self.adapters, self.parts.rank, self.parts.gradient_checkpointing)
        return FinetuningMemory(request, parts, self.adapters)

    @property
    def trained(self) -> Adapters:
        """All of them together."""
        return _sum(self.adapters.values())

    def place(self, max_memory: dict[Any, Any] | None = None) -> Placement:
        """Spread the model, with what training adds to each part, by the planner.

        Args:
            max_memory: as `plan_device_map` takes it: `{0: "rtx4090", 1: "rtx4090"}`; None for what is free here.

        Returns:
            `device_map` is for `from_pretrained`. `nbytes` has by device, in bytes: "dense" and "experts" weights
            with their adapters, gradients, optimizer states and copies; "cache": the activations that are kept;
            "working": the largest transient; "margin": see `devices.MARGIN`.

        Raises:
            DoesNotFit: `shortfall` says how many bytes are missing.
        """
        return self._place(devices_of(max_memory))

    def _place(self, devices: list[Device]) -> Placement:
        return place(replace(self.request, devices=tuple(devices)), self.parts)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by part, all on one card:

        * "weights": frozen parameters, scales and buffers, as the planner counts them;
        * "adapters": count x 4, as PEFT makes them float32;
        * "gradients": as many; "AdamW": twice as many;
        * "kept": what the forward pass keeps for the backward pass: `TrainingParts.kv_bytes` of every layer;
        * "working": the larger of one layer's backward pass and of the loss (vocabulary x 16 a token);
        * "copies": autocast's of the adapters, count x 2, and the unpacked block of one quantised matrix;
        * "margin": see `devices.MARGIN`.
        """
        kinds = self._place([_BOUNDLESS]).nbytes[0]
        method = replace(self.request, devices=(_BOUNDLESS,)).precision.methods[0]
        trained, unpacked = self.trained, self.parts.unpacking_bytes(method, "cuda")
        return {
            "weights": kinds["dense"] + kinds["experts"] - trained.training_bytes,
            "adapters": trained.nbytes,
            "gradients": trained.nbytes,
            "AdamW": _ADAMW_STATES * trained.nbytes,
            "kept": kinds["cache"],
            "working": kinds["working"] - unpacked,
            "copies": _AUTOCAST_ITEMSIZE * trained.count + unpacked,
            "margin": kinds["margin"],
        }

    def __str__(self) -> str:
        """The bytes by part in GiB."""
        parts = self.nbytes
        lines = [f"{self.trained.count:,} trained parameters; GiB on one card"]
        lines += [f"{name:10}{size / GIB:10.2f}" for name, size in {**parts, "in all": sum(parts.values())}.items()]
        return "\n".join(lines)


def finetuning_memory(
    model: str | Path | PreTrainedConfig,
    lora: Any,
    quantization: Any = None,
    *,
    context_tokens: int | None = None,
    batch_size: int = 1,
    gradient_checkpointing: bool = True,
    dtype: torch.dtype | str | None = None,
    **config_options: Any,
) -> FinetuningMemory:
    """What training LoRA adapters takes, from the config alone: nothing is read, and nothing allocated.

    Weights, adapters, gradients and optimizer states are exact, the rest is an upper bound. PEFT makes the adapters
    on the meta device, and they are counted.

    Args:
        model: a folder, a name on the Hub, or a config; the experts in the modular layout.
        lora: a `peft.LoraConfig`; without DoRA and `target_parameters`, whose activations are others.
        quantization: of the frozen weights, as `plan_device_map` takes it.
        context_tokens: tokens of a sequence; None is `config.max_position_embeddings`.
        batch_size: sequences at a time.
        gradient_checkpointing: whether layers are computed again in the backward pass. Without, what experts keep
            is counted on the device of their layer, wherever they are.
        dtype: of what is not quantised; None for the checkpoint's.
        config_options: for `AutoConfig.from_pretrained`.

    Raises:
        ValueError: an argument is wrong.
    """
    request = request_of(model, quantization, context_tokens, batch_size, dtype, **config_options)
    adapters = _adapters_by_part(request, lora)
    parts = _training_parts(request, adapters, max([lora.r, *lora.rank_pattern.values()]), gradient_checkpointing)
    return FinetuningMemory(request, parts, adapters)


def _training_parts(
    request: Request, adapters: dict[str, Adapters], rank: int, gradient_checkpointing: bool
) -> TrainingParts:
    parts = request.parts

    def trained(part: Part) -> Part:
        return replace(part, plain=part.plain + _sum(adapters[name] for name in part.names).training_bytes)

    layers = [
        LayerParts(layer.name, trained(layer.dense), [trained(expert) for expert in layer.experts])
        for layer in parts.layers
    ]
    changed = {"embeddings": trained(parts.embeddings), "layers": layers, "lm_head": trained(parts.lm_head)}
    return TrainingParts(**{**vars(parts), **changed}, rank=rank, gradient_checkpointing=gradient_checkpointing)


def _placed_modules(parts: ModelParts) -> list[str]:
    layers = [part for layer in parts.layers for part in (layer.dense, *layer.experts)]
    return [name for part in (parts.embeddings, *layers, parts.lm_head) for name in part.names]


def _sum(adapters: Iterable[Adapters]) -> Adapters:
    counted = list(adapters)
    return Adapters(sum(one.count for one in counted), sum(one.nbytes for one in counted))


def _adapters_by_part(request: Request, lora: Any) -> dict[str, Adapters]:
    """What PEFT adds to each module that the planner places."""
    from peft import LoraConfig, get_peft_model  # an extra

    if not isinstance(lora, LoraConfig):
        raise ValueError(f"`lora` is of type {type(lora).__name__}: expected a peft.LoraConfig.")
    with torch.device("meta"):
        model = request.model_class._from_config(deepcopy(request.config), dtype=request.precision.dtype)
        adapted = get_peft_model(model, deepcopy(lora))  # which writes into its config
    found = dict.fromkeys(_placed_modules(request.parts), Adapters(0, 0))
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            module = _enclosing(path.removeprefix("base_model.model."), found)
            found[module] = _sum([found[module], Adapters(parameter.numel(), parameter.nbytes)])
    return found


def _enclosing(path: str, names: dict[str, Any]) -> str:
    """The module among `names` that `path` is in."""
    while path not in names:
        path = path.rpartition(".")[0]
    return path
