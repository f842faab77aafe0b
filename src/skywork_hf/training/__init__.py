"""Training: chats as data, the adaptive auxiliary loss of Skywork-MoE, and what the gates do meanwhile."""

from .aux_loss import AdaptiveAuxLossCallback
from .data import read_conversations, tokenize_conversations

__all__ = ["AdaptiveAuxLossCallback", "read_conversations", "tokenize_conversations"]
