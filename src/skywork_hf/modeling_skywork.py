"""The dense Skywork models: transformers' Llama under the Skywork names.

The original remote code and Llama agree on the same weights (float32, 1e-5), so nothing is written again here but
which classes belong together.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from .compat import warns_of_the_old_cache_name
from .configuration_skywork import SkyworkConfig
from .loading import SkyworkLoadingMixin
from .losses import SkyworkLossMixin, learns_in_context


class SkyworkPreTrainedModel(SkyworkLoadingMixin, SkyworkLossMixin, LlamaPreTrainedModel):
    config: SkyworkConfig
    config_class = SkyworkConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, PreTrainedConfig) and config.model_type == "skywork_moe":
            raise ValueError(
                f"{type(self).__name__} is a dense model and the config is that of a Skywork-MoE checkpoint: load it "
                "with AutoModelForCausalLM or SkyworkMoeForCausalLM."
            )
        super().__init__(config, *args, **kwargs)


class SkyworkModel(SkyworkPreTrainedModel, LlamaModel):
    """The dense decoder: `input_ids` [batch, tokens] to `last_hidden_state` [batch, tokens, hidden_size]."""


class SkyworkForCausalLM(SkyworkPreTrainedModel, LlamaForCausalLM):
    """Skywork-13B with its language-model head: `logits` [batch, tokens, vocab_size]."""

    def __init__(self, config: SkyworkConfig) -> None:
        # Past LlamaForCausalLM's own, which would build a LlamaModel; SkyworkModel checks the config.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = SkyworkModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = warns_of_the_old_cache_name(learns_in_context(LlamaForCausalLM.forward))


class SkyworkForSequenceClassification(GenericForSequenceClassification, SkyworkPreTrainedModel):
    """The dense decoder with the original code's bias-free `score` head: `logits` [batch, num_labels], read at each
    sequence's last token that is not padding."""


__all__ = [
    "SkyworkForCausalLM",
    "SkyworkForSequenceClassification",
    "SkyworkModel",
    "SkyworkPreTrainedModel",
]
