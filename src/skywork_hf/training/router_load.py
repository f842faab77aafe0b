"""What the gates do in training: how evenly they load the experts, and how sharply they choose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..configuration_skywork import SkyworkMoeConfig
from ..modeling_skywork_moe import load_balancing_loss, routing_probabilities, token_weights, weighted_sum

# Above it a ratio of probabilities counts as this, so that a mean over tokens stays finite.
_LARGEST_RATIO = 1e6
_EXPERTS_FROM = 6  # the columns of the sums before those of each expert


@dataclass(frozen=True)
class RouterLoad:
    """Sums over tokens of what the gates of the MoE layers did. Loads of several steps and processes add up.

    Args:
        sums: float32 [MoE layers, 7 + 2 * experts]: what `router_sums` has, and dropped pairs of a token and an
            expert.
        top_k: experts chosen for each token.
    """

    sums: torch.Tensor
    top_k: int

    def __add__(self, other: RouterLoad) -> RouterLoad:
        return RouterLoad(self.sums + other.sums, self.top_k)

    @property
    def experts(self) -> int:
        return (self.sums.shape[1] - _EXPERTS_FROM - 1) // 2

    @property
    def tokens(self) -> torch.Tensor:
        """[MoE layers]"""
        return self.sums[:, 0].double()

    @property
    def aux_losses(self) -> torch.Tensor:
        """float64 [MoE layers]: the auxiliary loss without its coefficient, the mean over the batches by the shares
        that they have in the loss."""
        shares, losses = self.sums[:, 4:_EXPERTS_FROM].double().unbind(-1)
        return losses / torch.where(shares > 0, shares, 1)

    @property
    def drop_rates(self) -> torch.Tensor:
        """float64 [MoE layers]: the share of pairs of a token and an expert that experts of limited capacity would
        drop, d of eq. 7."""
        return self.sums[:, -1].double() / (self.tokens * self.top_k).clamp_min(1)

    @property
    def relative_loads(self) -> torch.Tensor:
        """float64 [MoE layers, experts]: each expert's tokens by its even share; 1 is even."""
        even = self.tokens * self.top_k / self.experts
        return self.sums[:, _counts(self.experts)].double() / even.clamp_min(1e-9).unsqueeze(-1)

    @property
    def sorted_probabilities(self) -> torch.Tensor:
        """float64 [MoE layers, experts]: the mean over tokens of the gate's probabilities, largest first."""
        return self.sums[:, _EXPERTS_FROM + self.experts : -1].double() / self.tokens.clamp_min(1).unsqueeze(-1)

    def statistics(self) -> dict[str, torch.Tensor]:
        """What is logged, each float64 [MoE layers]: `aux_loss`; `drop_rate`; `max_load` and `min_load`, of the most
        and the least used expert, 1 is even; `entropy` of the gate in nats; `max1_max2` and `max2_max3`, the ratios of
        its largest probabilities (tech report of Skywork-MoE, figure 3), the latter with at least three experts."""
        entropy, first, second = (self.sums[:, 1:4].double() / self.tokens.clamp_min(1).unsqueeze(-1)).unbind(-1)
        return {
            "aux_loss": self.aux_losses,
            "drop_rate": self.drop_rates,
            "max_load": self.relative_loads.amax(dim=-1),
            "min_load": self.relative_loads.amin(dim=-1),
            "entropy": entropy,
            "max1_max2": first,
        } | ({"max2_max3": second} if self.experts > 2 else {})


@torch.no_grad()
def router_sums(
    router_logits: tuple[torch.Tensor, ...],
    config: SkyworkMoeConfig,
    attention_mask: torch.Tensor | None = None,
    share: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Sums over the tokens of a batch, without waiting for a device and in float32 whatever autocast says; those of a
    step's batches add up.

    Args:
        router_logits: one [batch * tokens, experts] for each MoE layer, as a model returns them.
        attention_mask: [batch, tokens], 0 where a token is padding and does not count.
        share: no dimensions, of the step's loss that the batch has: `share_of_step`.

    Returns:
        float32 [MoE layers, 6 + 2 * experts]: tokens, entropy, Max1/Max2, Max2/Max3, the share, the auxiliary loss by
        this share, the tokens that chose each expert, and the gate's probabilities, largest first.
    """
    device = router_logits[0].device
    weight = token_weights(router_logits[0], attention_mask)
    losses = load_balancing_loss(router_logits, config, attention_mask)
    of_loss = torch.stack([torch.ones_like(losses), losses], dim=-1)
    of_loss = of_loss * (share.to(device) if isinstance(share, torch.Tensor) else share)
    of_tokens = torch.stack([_layer_sums(logits.to(device), weight, config) for logits in router_logits])
    return torch.cat([of_tokens[:, :4], of_loss, of_tokens[:, 4:]], dim=-1)


def load_of_step(sums: torch.Tensor, config: SkyworkMoeConfig) -> RouterLoad:
    """What the gates did in a step.

    The experts' capacity, by which pairs count as dropped, is `config.router_capacity_factor` times the even share of
    the step's tokens, rounded up: it does not matter in how many batches these came.

    Args:
        sums: as `router_sums` gives them, added up over the step's batches.
    """
    tokens, counts = sums[:, :1], sums[:, _counts(config.num_local_experts)]
    dropped = (counts - torch.ceil(tokens * _capacity(config))).clamp_min(0).sum(dim=-1, keepdim=True)
    return RouterLoad(torch.cat([sums, dropped], dim=-1), config.num_experts_per_tok)


def balanced_drop_rate(tokens: int, config: SkyworkMoeConfig) -> float:
    """The drop rate to expect of a step of `tokens` whose gate is balanced, and chooses at random.

    Each of the n tokens chooses an expert with the chance p = top_k / experts, so that an expert's number of tokens X
    is binomial with the mean n p. Above its capacity c it drops them: the rate is E[max(X - c, 0)] / (n p), the sum of
    (x - c) P(X = x) over x > c by n p. With the capacity factor 1, c = n p, it is half of the mean absolute deviation
    of X by its mean, about sqrt((1 - p) / (2 pi n p)).
    """
    chance = torch.tensor(config.num_experts_per_tok / config.num_local_experts, dtype=torch.float64)
    capacity = math.ceil(tokens * _capacity(config))
    taken = torch.arange(capacity + 1, tokens + 1, dtype=torch.float64)
    left = tokens - taken
    ways = math.lgamma(tokens + 1) - torch.lgamma(taken + 1) - torch.lgamma(left + 1)
    chances = torch.exp(ways + torch.xlogy(taken, chance) + torch.xlogy(left, 1 - chance))
    return ((taken - capacity) * chances).sum().item() / (tokens * chance.item())


def _capacity(config: SkyworkMoeConfig) -> float:
    """An expert's, by the number of tokens, before it is rounded up."""
    return config.router_capacity_factor * config.num_experts_per_tok / config.num_local_experts


def _counts(experts: int) -> slice:
    """Where sums have the tokens that chose each expert."""
    return slice(_EXPERTS_FROM, _EXPERTS_FROM + experts)


def _layer_sums(logits: torch.Tensor, weight: torch.Tensor, config: SkyworkMoeConfig) -> torch.Tensor:
    probabilities = routing_probabilities(logits, config)
    largest, order = probabilities.sort(dim=-1, descending=True)
    chosen = torch.zeros_like(probabilities).scatter_(1, order[:, : config.num_experts_per_tok], 1.0)
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1, keepdim=True)
    ratios = (largest[:, :2] / _next(largest).clamp_min(1e-30)).clamp_max(_LARGEST_RATIO)
    return weighted_sum(weight, torch.cat([torch.ones_like(entropy), entropy, ratios, chosen, largest], dim=-1))


def _next(largest: torch.Tensor) -> torch.Tensor:
    """The second and the third of each row; the second again where there are only two."""
    return torch.stack([largest[:, 1], largest[:, min(2, largest.shape[1] - 1)]], dim=-1)
