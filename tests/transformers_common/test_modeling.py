"""transformers' own common model tests, on our models."""

from __future__ import annotations

import importlib
import unittest
from fnmatch import filter as matching
from typing import Any
from unittest import mock

import pytest
import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.testing_utils import torch_device

from skywork_hf import (
    SkyworkConfig,
    SkyworkForCausalLM,
    SkyworkForSequenceClassification,
    SkyworkModel,
    SkyworkMoeConfig,
    SkyworkMoeForCausalLM,
    SkyworkMoeModel,
)
from tests import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from tests.transformers_common.skips import SKIPS

# Their lists of model types that are worth the time, transformers' own; None is every type.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


ROLES = (MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


class ModelTester:
    """What the common tests ask about a model: a tiny config, and inputs for it."""

    is_training = True
    batch_size = 3
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, config_class: type, causal_lm_class: type, **changes: Any) -> None:
        self.config_class = config_class
        self.causal_lm_class = causal_lm_class
        self.changes = changes

    def get_config(self) -> Any:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        shape = {name: getattr(self, name) for name in names}
        return self.config_class(
            **shape, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=512, **self.changes
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        attention_mask = torch.ones_like(input_ids).tril().to(torch_device)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonTests(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    config_class: type
    changes: dict[str, Any] = {}
    model_tester = None
    test_can_init_all_missing_weights_before_2023 = True  # it takes files without a year for old ones
    training_overfit_steps, training_overfit_learning_rate = 100, 5e-3  # theirs: 300, 1e-3; these models are small

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = ModelTester(self.config_class, self.all_model_classes[1], **self.changes)
        # These names, to which AutoModel.register does not add, tell the common tests what a class is for.
        for names, model_class in zip(ROLES, self.all_model_classes, strict=False):
            patch = mock.patch.dict(names, {self.config_class.model_type: model_class.__name__})
            patch.start()
            self.addCleanup(patch.stop)

    def test_config(self) -> None:
        ConfigTester(self, config_class=self.config_class, **self.changes).run_common_tests()


class SkyworkTest(CommonTests, unittest.TestCase):
    config_class = SkyworkConfig
    all_model_classes = (SkyworkModel, SkyworkForCausalLM, SkyworkForSequenceClassification)


class SkyworkMoeFusedTest(test_expert_parallel_mixin.ExpertParallelTesterMixin, CommonTests, unittest.TestCase):
    config_class = SkyworkMoeConfig
    all_model_classes = (SkyworkMoeModel, SkyworkMoeForCausalLM)
    changes = {"num_local_experts": 4, "experts_layout": "fused"}
    test_all_params_have_gradient = False  # those of an expert that no token chose have none


class SkyworkMoeModularTest(SkyworkMoeFusedTest):
    changes = {"num_local_experts": 4}


class SkyworkMoeInterleavedTest(SkyworkMoeModularTest):
    """Dense layers between MoE layers, and the two-layer gate."""

    changes = {"num_local_experts": 4, "moe_expert_interval": 2, "moe_2layer_gate": True}


@pytest.mark.parametrize("listed", SKIPS)
def test_every_listed_skip_is_of_a_test(listed: str) -> None:
    module, _, name = listed.partition(".")
    tests = dir(getattr(importlib.import_module(f"tests.transformers_common.{module}"), name))
    assert [pattern for pattern in SKIPS[listed] if not matching(tests, pattern)] == []
