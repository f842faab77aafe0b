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
*BEFORE, LAST = TokenizerTesterMixin.integration_test_input_string.split("<s>")
TOKENS = [token for text in BEFORE for token in (*ORACLE.encode(text, out_type=str), "<s>")]
TOKENS += ORACLE.encode(LAST, out_type=str)


class SkyworkTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = SkyworkTokenizer
    from_pretrained_id = str(FOLDER)
    integration_expected_tokens = TOKENS
    integration_expected_token_ids = ORACLE.piece_to_id(TOKENS)
    # The original decodes a text before a special token with the space that the tokenizer put before it.
    integration_expected_decoded_text = "".join(f" {text}<s>" for text in BEFORE) + LAST


class SkyworkTokenizersBackendTest(TokenizersBackendTesterMixin, unittest.TestCase):
    tokenizer_class = SkyworkTokenizer
    from_pretrained_id = str(FOLDER)
