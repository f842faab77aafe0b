"""transformers' own common tokenizer tests, on our tokenizer."""

from __future__ import annotations

import unittest

import sentencepiece
from tests.test_tokenization_common import TokenizerTesterMixin
from tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin

from skywork_hf import SkyworkTokenizer

from ..tiny import checkpoint

FOLDER = checkpoint("skywork-13b-tiny")
ORACLE = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


class SkyworkTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = SkyworkTokenizer
    from_pretrained_id = str(FOLDER)
    integration_expected_tokens = ORACLE.encode(TokenizerTesterMixin.integration_test_input_string, out_type=str)
    integration_expected_token_ids = ORACLE.encode(TokenizerTesterMixin.integration_test_input_string)
    integration_expected_decoded_text = TokenizerTesterMixin.integration_test_input_string


class SkyworkTokenizersBackendTest(TokenizersBackendTesterMixin, unittest.TestCase):
    tokenizer_class = SkyworkTokenizer
    from_pretrained_id = str(FOLDER)
