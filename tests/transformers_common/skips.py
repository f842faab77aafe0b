"""Every common test of transformers that we do not run on a class of ours, and why. (Those that transformers' tests
skip by themselves, `pytest -ra` lists with their reasons.)

Module and class of ours, to the tests' names (`*` stands for anything), to the reason. `test_modeling.py` fails where
a name is no test any more.
"""

from __future__ import annotations

_ONE_LOOP = {
    "test_eager_matches_batched_and_grouped_inference_*": "It compares implementations of the experts, of which the "
    "modular layout has one.",
    "test_ep_*": "Expert parallelism splits the 3-D parameters of the fused layout; 5.19 fails where others skip.",
}

_NOTHING_OF_THE_MODEL = {
    "test_model_weights_reload_no_missing_tied_weights": "It loads a file that holds nothing of the model, which we "
    "refuse rather than fill all of it at random.",
}

SKIPS: dict[str, dict[str, str]] = {
    "test_modeling.SkyworkTest": _NOTHING_OF_THE_MODEL,
    "test_modeling.SkyworkMoeFusedTest": _NOTHING_OF_THE_MODEL,
    "test_modeling.SkyworkMoeModularTest": _ONE_LOOP | _NOTHING_OF_THE_MODEL,
    "test_modeling.SkyworkMoeInterleavedTest": _ONE_LOOP | _NOTHING_OF_THE_MODEL,
    "test_tokenization.SkyworkTokenizersBackendTest": {
        "test_alignment_methods": "It counts words, and there are none: to SentencePiece, the whole text is one word.",
        "test_training_new_tokenizer": "It expects that decoded text is normalized text, `▁` for spaces and all.",
        "test_training_new_tokenizer_with_special_tokens_change": "As test_training_new_tokenizer.",
    },
}
