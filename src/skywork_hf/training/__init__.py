"""Training what is Skywork-MoE's own: the adaptive auxiliary loss, and what the gates do meanwhile."""

from .aux_loss import AdaptiveAuxLossCallback

__all__ = ["AdaptiveAuxLossCallback"]
