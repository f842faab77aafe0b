"""What everything takes, in bytes, before a weight is read: the model is built on the meta device and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..quantization import formats, matmul
from ..quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear
from ..quantization.quantizers import linears_to_quantize
from .precision import BITSANDBYTES, PLAIN

# Bits of a value by `kv_cache_dtype`. "fp8" has one scale a tensor; the others are transformers' `QuantizedCache`: a
# scale and a zero point for each group, and the last tokens of each sequence in the model's dtype.
KV_CACHE_BITS = {"fp8": 8, "int8": 8, "int4": 4, "int2": 2}
_KV_GROUP, _KV_RESIDUAL = 64, 128
# Which of its backends does that; and what it has in hand while a layer's cache grows, in such caches of the model's
# dtype: all is unpacked, appended to and, but for "fp8", packed again. Measured (tests/test_placement_sizes.py): 3.0
# with fp8, 3.4 with quanto, 11.4 with hqq.
KV_CACHE_BACKENDS = {"fp8": "fp8", "int8": "hqq", "int4": "quanto", "int2": "quanto"}
_KV_UNPACKED = {None: 1, "fp8": 3, "quanto": 4, "hqq": 12}
# Tensors that transformers' loader has in flight on a device at once: as many as it has threads.
_LOADER_THREADS = 4

_BNB_BLOCK, _BNB_NESTED_BLOCK = 64, 256


@cache
def linear_bytes(out_features: int, in_features: int, has_bias: bool, method: str, itemsize: int) -> int:
    """A linear's weight, scales and bias.

    Args:
        method: what the linear is held as, see `Precision.methods`.
        itemsize: of the model's dtype.
    """
    numel, bias = out_features * in_features, out_features * itemsize * has_bias
    if method in BITSANDBYTES:
        return _bitsandbytes_bytes(numel, out_features, method) + bias
    if method.startswith("fp8"):
        scheme = "static" if method == "fp8-static" else "dynamic"
        fp8 = SkyworkFp8Linear(in_features, out_features, False, scheme, device="meta")
        return tensor_bytes(fp8) + bias
    if method == "int8":
        return tensor_bytes(SkyworkInt8Linear(in_features, out_features, device="meta")) + bias
    return numel * itemsize + bias


def _bitsandbytes_bytes(numel: int, out_features: int, method: str) -> int:
    """bitsandbytes.functional: int8 with a float32 statistic for each row; 4 bit with a float32 scale for each 64
    weights, or an 8-bit one that has scales of its own, and the tables that decode them."""
    if method == "bnb-int8":
        return numel + 4 * out_features
    blocks = -(-numel // _BNB_BLOCK)
    table = 16 * 4
    if method == "nf4":
        return -(-numel // 2) + 4 * blocks + table
    nested = 4 * -(-blocks // _BNB_NESTED_BLOCK) + 256 * 4 + 4
    return -(-numel // 2) + blocks + table + nested


def tensor_bytes(module: nn.Module) -> int:
    """Parameters and buffers of a module; bitsandbytes' statistics beside them."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes + statistics_bytes(tensor) for tensor in tensors)


def statistics_bytes(weight: torch.Tensor) -> int:
    """What bitsandbytes keeps beside a quantised weight."""
    row_scales = getattr(weight, "SCB", None)
    if row_scales is not None:
        return row_scales.nbytes
    state = getattr(weight, "quant_state", None)
    if state is None:
        return 0
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


@dataclass
class Part:
    """Modules that are placed together.

    Args:
        names: the modules' names in the model.
        plain: bytes of what is not quantised.
        linears: shapes of those linears that are, as (out_features, in_features, has_bias).
    """

    names: tuple[str, ...]
    plain: int = 0
    linears: Counter[tuple[int, int, bool]] = field(default_factory=Counter)

    def nbytes(self, method: str, itemsize: int) -> int:
        return self.plain + sum(n * linear_bytes(*shape, method, itemsize) for shape, n in self.linears.items())


@dataclass
class LayerParts:
    """One decoder layer: what is dense, and each expert of the modular layout."""

    name: str
    dense: Part
    experts: list[Part]

    @property
    def whole(self) -> LayerParts:
        """The layer in one part, under its own name."""
        parts = [self.dense, *self.experts]
        linears: Counter[tuple[int, int, bool]] = sum((part.linears for part in parts), Counter())
        return LayerParts(self.name, Part((self.name,), sum(part.plain for part in parts), linears), [])


@dataclass
class ModelParts:
    """A model's parts in the order in which a forward pass meets them, and what the sizes of everything else need.

    Args:
        embeddings: with the rotary tables.
        layers: the decoder layers.
        lm_head: with the last norm; that alone, or a classifier's head, where the model is another.
        is_tied: LM head and embeddings share their weight, so that they belong on one device.
        kv_cache_dtype: a name of `KV_CACHE_BITS`; None for `dtype`.
    """

    config: Any
    dtype: torch.dtype
    embeddings: Part
    layers: list[LayerParts]
    lm_head: Part
    is_tied: bool
    kv_cache_dtype: str | None

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def head_dim(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def kv_bytes(self, tokens: int, batch: int) -> int:
        """One layer's keys and values of `tokens` tokens (all sequences together), as the cache holds them."""
        elements = self._kv_elements(tokens)
        if self.kv_cache_dtype is None:
            return elements * self.itemsize
        packed = elements * KV_CACHE_BITS[self.kv_cache_dtype] // 8
        if self.kv_cache_dtype == "fp8":
            return packed
        residual = self._kv_elements(min(tokens, _KV_RESIDUAL * batch))
        return packed + (2 * -(-elements // _KV_GROUP) + residual) * self.itemsize

    def _kv_elements(self, tokens: int) -> int:
        return 2 * tokens * self.config.num_key_value_heads * self.head_dim

    def dense_working_bytes(self, tokens: int, batch: int) -> int:
        """The largest transient of a layer on its own device while a prompt of `tokens` tokens (all sequences
        together) is read: the experts' inputs and outputs and their float32 sum, or attention's or a dense layer's
        intermediates; one layer's cache, which grows by copying, or by unpacking; the logits."""
        config = self.config
        hidden, itemsize = config.hidden_size, self.itemsize
        attention = 12 * hidden * itemsize
        top_k = config.num_experts_per_tok if any(layer.experts for layer in self.layers) else 0
        routed = (2 + 3 * top_k) * hidden * itemsize + 2 * top_k * hidden * 4
        dense = 0 if top_k and all(layer.experts for layer in self.layers) else self._mlp_bytes_per_row
        logits = batch * config.vocab_size * (itemsize + 4)
        backend = self.kv_cache_dtype and KV_CACHE_BACKENDS[self.kv_cache_dtype]
        cache = _KV_UNPACKED[backend] * self._kv_elements(tokens) * itemsize
        return tokens * max(attention, routed, dense) + cache + logits

    def expert_working_bytes(self, tokens: int) -> int:
        """The largest transient of an expert that gets `tokens` tokens, beside `unpacking_bytes`."""
        return tokens * self._mlp_bytes_per_row

    def pinned_bytes(self, tokens: int) -> int:
        """The pinned memory on the CPU through which GPUs send the rows of its experts and get their outputs; torch
        rounds such memory up to powers of two."""
        return 2 * 2 * tokens * self.config.num_experts_per_tok * self.config.hidden_size * self.itemsize

    @property
    def _mlp_bytes_per_row(self) -> int:
        """Of the intermediates three are alive at a time, one in 32 bit before it is rounded, and what quantising
        one as the next matrix's input takes."""
        config = self.config
        return config.intermediate_size * (3 * self.itemsize + 10) + 2 * config.hidden_size * self.itemsize

    def unpacking_bytes(self, method: str, device_type: str) -> int:
        """What a matmul that unpacks quantised weights takes for them at a time.

        Args:
            method: see `Precision.methods`.
            device_type: "cpu", or a GPU's.
        """
        elements = self.config.hidden_size * self.config.intermediate_size
        if method == PLAIN:
            return 0
        if method in BITSANDBYTES:  # the whole matrix
            return elements * self.itemsize
        weight_dtype = torch.int8 if method == "int8" else formats.FP8
        return matmul.unpacking_bytes(elements, weight_dtype, self.dtype, device_type)

    @property
    def loading_bytes(self) -> int:
        """What quantising while loading takes beside the weights: some matrices in the files' dtype, one of them in
        blocks of float32."""
        config = self.config
        largest = config.hidden_size * max(config.intermediate_size, config.hidden_size)
        return _LOADER_THREADS * largest * 2 + 2 * 4 * min(formats.GPU_BLOCK, largest)


def model_parts(
    model_class: Any,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    modules_to_not_convert: list[str] | None,
    kv_cache_dtype: str | None = None,
) -> ModelParts:
    """Build the model on the meta device and take it apart. Takes about a second for 146B parameters, no memory."""
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype)
    quantised = linears_to_quantize(model, modules_to_not_convert)
    base = getattr(model, model.base_model_prefix, model)
    prefix = f"{model.base_model_prefix}." if base is not model else ""

    def part(*names: str) -> Part:
        return _part(model, names, quantised)

    layers = [_layer_parts(part, f"{prefix}layers.{n}", layer) for n, layer in enumerate(base.layers)]
    embeddings = part(*(f"{prefix}{name}" for name in ("embed_tokens", "rotary_emb")))
    others = [name for name, _ in model.named_children() if name != model.base_model_prefix] if prefix else []
    is_tied = bool(model.all_tied_weights_keys)
    lm_head = part(f"{prefix}norm", *others)
    if is_tied:
        lm_head.plain -= base.embed_tokens.weight.nbytes
    return ModelParts(model.config, dtype, embeddings, layers, lm_head, is_tied, kv_cache_dtype)


def _part(model: nn.Module, names: tuple[str, ...], quantised: dict[str, nn.Linear]) -> Part:
    part = Part(names)
    for name in names:
        module = model.get_submodule(name)
        for path, child in module.named_modules(prefix=name):
            if path in quantised:
                linear = quantised[path]
                part.linears[linear.out_features, linear.in_features, linear.bias is not None] += 1
            else:
                tensors = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
                part.plain += sum(tensor.nbytes for tensor in tensors)
    return part


def _layer_parts(part: Any, name: str, layer: nn.Module) -> LayerParts:
    block = getattr(layer, "block_sparse_moe", None)
    if block is None or not isinstance(block.experts, nn.ModuleList):
        return LayerParts(name, part(name), [])
    dense = [f"{name}.{child}" for child, _ in layer.named_children() if child != "block_sparse_moe"]
    experts = f"{name}.block_sparse_moe.experts"
    return LayerParts(
        name,
        part(*dense, f"{name}.block_sparse_moe.gate"),
        [part(f"{experts}.{n}") for n in range(len(block.experts))],
    )
