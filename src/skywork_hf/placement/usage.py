"""How often each expert is chosen, counted on texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from ..modeling_skywork_moe import SkyworkMoeGate, routing_probabilities
from ..untrusted import read_json
from .heatmap import usage_figure, write

# Beyond it floating-point numbers skip integers.
_MOST_COUNTED = 2**53


@dataclass
class ExpertUsage:
    """Counts of chosen experts.

    Args:
        layers: the numbers of the MoE layers, from 0.
        counts: int64 [MoE layers, experts], tokens that chose the expert.
        together: int64 [MoE layers, experts, experts], tokens that chose both; symmetric, the diagonal is `counts`.
        tokens: how many tokens were counted.
    """

    layers: list[int]
    counts: torch.Tensor
    together: torch.Tensor
    tokens: int

    @property
    def shares(self) -> torch.Tensor:
        """float64 [MoE layers, experts]: the probability that a token chooses the expert; a row sums to top_k."""
        return self.counts.double() / max(1, self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        counts, together = self.counts.tolist(), self.together.tolist()
        return {"layers": self.layers, "tokens": self.tokens, "counts": counts, "together": together}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ExpertUsage:
        """From `to_dict`.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        layers, counts, together, tokens = (_numbers(content[name]) for name in cls.__dataclass_fields__)
        if (layers.dim(), counts.dim(), tokens.dim()) != (1, 2, 0) or counts.shape[0] != len(layers):
            raise ValueError(f"{list(layers.shape)} layers and counts {list(counts.shape)} do not fit each other")
        if together.shape != (*counts.shape, counts.shape[-1]):
            raise ValueError(f"counts {list(counts.shape)} and pairs {list(together.shape)} do not fit each other")
        return cls(layers.tolist(), counts, together, int(tokens))

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExpertUsage:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no expert usage ({error}): write one with collect_expert_usage."
            ) from error

    def share_of_hits(self, fraction: float) -> float:
        """The share of expert calls that the most used `fraction` of all experts takes: what keeping these on the GPUs
        is worth. It is `fraction` itself where routing is even."""
        ordered = self.counts.flatten().sort(descending=True).values.double()
        kept = round(fraction * len(ordered))
        return float(ordered[:kept].sum() / ordered.sum().clamp_min(1))

    def __str__(self) -> str:
        """What the counts are worth, in sentences."""
        lines = [f"{self.tokens:,} tokens, {len(self.layers)} MoE layers of {self.counts.shape[1]} experts"]
        lines += [
            f"  the most used {share:.0%} of the experts take {self.share_of_hits(share):.1%} of the calls"
            for share in (0.25, 0.5, 0.75)
        ]
        gain = self.share_of_hits(0.5) - 0.5
        verdict = "little: routing is nearly even" if gain < 0.05 else f"{gain:.1%} more hits where half of them fit"
        return "\n".join([*lines, f"  what choosing by usage is worth: {verdict}"])

    def draw(self, path: str | Path) -> None:
        """Write the heat map, layers by experts, as an image. Needs matplotlib."""
        write(usage_figure(self.layers, self.shares, self.tokens, self.share_of_hits(0.5)), path)


def _numbers(content: Any) -> torch.Tensor:
    """Nested lists of counts."""
    flat = [content]
    while any(isinstance(one, list) for one in flat):
        flat = [inner for one in flat for inner in (one if isinstance(one, list) else [one])]
    if wrong := [one for one in flat if not (type(one) is int and 0 <= one < _MOST_COUNTED)]:
        raise ValueError(f"it has {wrong[0]!r} for a count")
    return torch.tensor(content, dtype=torch.int64)


@torch.no_grad()
def collect_expert_usage(
    model: Any, texts: Iterable[str | torch.Tensor], tokenizer: Any = None, max_tokens: int | None = None
) -> ExpertUsage:
    """Count which experts a model chooses on texts, one text at a time.

    Args:
        model: a Skywork-MoE model.
        texts: strings, or int64 ids [tokens] or [1, tokens].
        tokenizer: for strings; None loads that of the checkpoint that the model came from.
        max_tokens: of each text; longer ones are cut. None is `config.max_position_embeddings`.

    Raises:
        ValueError: the model has no experts, or there is no text.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, SkyworkMoeGate)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts to count.")
    config = model.config
    experts, limit = config.num_local_experts, max_tokens or config.max_position_embeddings
    together = torch.zeros(len(layers), experts, experts, dtype=torch.int64)
    tokens = 0
    for text in logging.tqdm(list(texts), desc="Counting experts"):
        if isinstance(text, str) and tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
        ids = tokenizer(text, return_tensors="pt").input_ids if isinstance(text, str) else text
        ids = ids.reshape(1, -1)[:, :limit].to(model.device)
        if not ids.shape[1]:
            continue
        # The logits of this call alone, whatever other threads generate meanwhile.
        outputs = getattr(model, model.base_model_prefix, model)(ids, use_cache=False, output_router_logits=True)
        for row, logits in enumerate(outputs.router_logits):
            chosen = routing_probabilities(logits, config).topk(config.num_experts_per_tok).indices
            chose = torch.nn.functional.one_hot(chosen.cpu(), experts).sum(dim=1).double()
            together[row] += (chose.t() @ chose).long()
        tokens += ids.shape[1]
    if not tokens:
        raise ValueError("`texts` holds no tokens: there is nothing to count.")
    numbers = [int(name.split("layers.")[1].split(".")[0]) for name in layers]
    return ExpertUsage(numbers, together.diagonal(dim1=1, dim2=2).clone(), together, tokens)
