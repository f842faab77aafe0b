"""What the gates do in training: how evenly they load the experts, and how sharply they choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..configuration_skywork import SkyworkMoeConfig
from ..modeling_skywork_moe import routing_probabilities, token_weights

# Above it a ratio of probabilities counts as this, so that a mean over tokens stays finite.
_LARGEST_RATIO = 1e6


@dataclass(frozen=True)
class RouterLoad:
    """Sums over tokens of what the gates of the MoE layers did. Loads of several batches and processes add up.

    Args:
        sums: float32 [MoE layers, 5 + 2 * experts]: tokens, dropped pairs of a token and an expert, entropy,
            Max1/Max2, Max2/Max3, the tokens that chose each expert, and the gate's probabilities, largest first.
        top_k: experts chosen for each token.
    """

    sums: torch.Tensor
    top_k: int

    def __add__(self, other: RouterLoad) -> RouterLoad:
        return RouterLoad(self.sums + other.sums, self.top_k)

    @property
    def experts(self) -> int:
        return (self.sums.shape[1] - 5) // 2

    @property
    def tokens(self) -> torch.Tensor:
        """[MoE layers]"""
        return self.sums[:, 0].double()

    @property
    def drop_rates(self) -> torch.Tensor:
        """float64 [MoE layers]: the share of pairs of a token and an expert that experts of limited capacity would
        drop, d of eq. 7."""
        return self.sums[:, 1].double() / (self.tokens * self.top_k).clamp_min(1)

    @property
    def relative_loads(self) -> torch.Tensor:
        """float64 [MoE layers, experts]: each expert's tokens by its even share; 1 is even."""
        even = self.tokens * self.top_k / self.experts
        return self.sums[:, 5 : 5 + self.experts].double() / even.clamp_min(1e-9).unsqueeze(-1)

    @property
    def sorted_probabilities(self) -> torch.Tensor:
        """float64 [MoE layers, experts]: the mean over tokens of the gate's probabilities, largest first."""
        return self.sums[:, 5 + self.experts :].double() / self.tokens.clamp_min(1).unsqueeze(-1)

    def statistics(self) -> dict[str, torch.Tensor]:
        """What is logged, each float64 [MoE layers]: `drop_rate`; `max_load` and `min_load`, of the most and the least
        used expert, 1 is even; `entropy` of the gate in nats; `max1_max2` and `max2_max3`, the ratios of its largest
        probabilities (tech report of Skywork-MoE, figure 3), the latter with at least three experts."""
        entropy, first, second = (self.sums[:, 2:5].double() / self.tokens.clamp_min(1).unsqueeze(-1)).unbind(-1)
        return {
            "drop_rate": self.drop_rates,
            "max_load": self.relative_loads.amax(dim=-1),
            "min_load": self.relative_loads.amin(dim=-1),
            "entropy": entropy,
            "max1_max2": first,
        } | ({"max2_max3": second} if self.experts > 2 else {})


@torch.no_grad()
def router_load(
    router_logits: tuple[torch.Tensor, ...], config: SkyworkMoeConfig, attention_mask: torch.Tensor | None = None
) -> RouterLoad:
    """What the gates did on one batch, without waiting for a device.

    The experts' capacity, by which pairs count as dropped, is `config.router_capacity_factor` times the even share of
    this batch's tokens, rounded up.

    Args:
        router_logits: one [batch * tokens, experts] for each MoE layer, as a model returns them.
        attention_mask: [batch, tokens], 0 where a token is padding and does not count.
    """
    device = router_logits[0].device
    weight = token_weights(router_logits[0], attention_mask)
    return RouterLoad(
        torch.stack([_layer_sums(logits.to(device), weight, config) for logits in router_logits]),
        config.num_experts_per_tok,
    )


def _layer_sums(logits: torch.Tensor, weight: torch.Tensor, config: SkyworkMoeConfig) -> torch.Tensor:
    probabilities = routing_probabilities(logits, config)
    largest, order = probabilities.sort(dim=-1, descending=True)
    chosen = torch.zeros_like(probabilities).scatter_(1, order[:, : config.num_experts_per_tok], 1.0)
    counts = weight @ chosen
    share = config.router_capacity_factor * config.num_experts_per_tok / config.num_local_experts
    dropped = (counts - torch.ceil(weight.sum() * share)).clamp_min(0).sum()
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1)
    ratios = (largest[:, :2] / _next(largest).clamp_min(1e-30)).clamp_max(_LARGEST_RATIO)
    return torch.cat(
        [
            torch.stack([weight.sum(), dropped, weight @ entropy]),
            weight @ ratios,
            counts,
            weight @ largest,
        ]
    )


def _next(largest: torch.Tensor) -> torch.Tensor:
    """The second and the third of each row; the second again where there are only two."""
    return torch.stack([largest[:, 1], largest[:, min(2, largest.shape[1] - 1)]], dim=-1)
