"""Stand-in for a module of transformers that its source distribution lacks: fields that every config takes, each with
a value that is not its default."""

config_common_kwargs = {
    "architectures": ["SomeModel"],
    "bos_token_id": 7,
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "eos_token_id": 8,
    "id2label": {0: "label"},
    "is_encoder_decoder": True,
    "label2id": {"label": "0"},
    "output_attentions": True,
    "output_hidden_states": True,
    "pad_token_id": 9,
    "problem_type": "regression",
    "return_dict": False,
    "tie_word_embeddings": True,
}
