"""The tokenizer against the golden ids of the original class, and against SentencePiece itself on any text."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tiny import checkpoint, tiny_dense_config, tiny_moe_config
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.testing_utils import CaptureLogger

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM, SkyworkTokenizer
from skywork_hf.tokenization_skywork import PIECES, _fields, _read_pieces, logger

FOLDER = checkpoint("skywork-13b-tiny")
GOLDEN = json.loads((FOLDER / "golden_tokenizer.json").read_text())
USER, BOT, SEP = 4007, 4008, 4009
CHAT_TOKENS = {"[USER]": USER, "[BOT]": BOT, "[SEP]": SEP}
SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2}
ORACLE = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
PLAIN = SkyworkTokenizer.from_pretrained(FOLDER)
CHAT = SkyworkTokenizer.from_pretrained(FOLDER)
CHAT.add_chat_tokens()


@pytest.fixture
def tokenizer() -> SkyworkTokenizer:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def chat_tokenizer() -> SkyworkTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.add_chat_tokens()
    return tokenizer


def messages(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat in which user and assistant take turns."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


def chat(tokenizer: SkyworkTokenizer, *turns: str, system: str | None = None, **options) -> list[int]:
    options = {"add_generation_prompt": True, **options}
    return tokenizer.apply_chat_template(messages(*turns, system=system), **options)["input_ids"]


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def sentencepiece_model(*extra: tuple[str, float, int]) -> bytes:
    """The model of the fixture with more pieces: messages of protobuf add up when they are put one after another."""
    model = (FOLDER / "tokenizer.model").read_bytes()
    for piece, score, kind in extra:
        name = piece.encode()
        fields = b"\x0a" + varint(len(name)) + name + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        model += b"\x0a" + varint(len(fields)) + fields
    return model


# --- Plain text


def test_defaults(tokenizer):
    assert type(tokenizer) is SkyworkTokenizer
    assert len(tokenizer) == tokenizer.vocab_size == GOLDEN["vocab_size"]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (True, False)
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("tokenizer", "row"),
    [*((PLAIN, row) for row in GOLDEN["plain"]), *((CHAT, row) for row in GOLDEN["after_chat_tokens"])],
    ids=lambda value: value["text"][:20] if isinstance(value, dict) else str(len(value)),
)
def test_golden_rows(tokenizer, row):
    assert tokenizer(row["text"])["input_ids"] == row["ids"]
    assert tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["ids_no_special"]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(row["text"])) == row["ids_no_special"]
    assert tokenizer.decode(row["ids"]) == row["decoded_with_special"]
    for ids in (row["ids"], row["ids_no_special"]):
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["decoded"]


LIKELY = st.sampled_from(
    [
        " ",
        "  ",
        "▁",
        "\n",
        "\r",
        "\t",
        "<s>",
        "</s>",
        "<unk>",
        "s>",
        "<0x0A>",
        "the",
        "西安",
        "é",
        "🐉",
        "12",
        "\u3000",
    ]
)
ANY_TEXT = st.one_of(st.lists(LIKELY).map("".join), st.text(st.characters(exclude_categories=["Cs"])))
WITH_CHAT_TOKENS = st.lists(st.one_of(LIKELY, st.sampled_from(list(CHAT_TOKENS)), st.text("aé <"))).map("".join)


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT)
@example("")
@example(" ")
@example("<0x41><s>")
@example("a" * 1000)
def test_any_text_gives_sentencepieces_ids_and_comes_back(text):
    ids = PLAIN(text, split_special_tokens=True)["input_ids"]
    if "\0" not in text:  # where SentencePiece's Python binding ends the text
        assert ids == [1, *ORACLE.encode(text)]
    assert PLAIN.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")


def ids_of_the_original(text: str) -> list[int]:
    """Its slow class cut a text at tokens, took away the white space around added ones, and encoded part by part."""
    parts = re.split(r"(\[USER\]|\[BOT\]|\[SEP\]|</?s>|<unk>)", text)
    ids = []
    for n, part in enumerate(parts):
        part = part.lstrip() if parts[n - 1 : n] and parts[n - 1] in CHAT_TOKENS else part
        part = part.rstrip() if parts[n + 1 : n + 2] and parts[n + 1] in CHAT_TOKENS else part
        ids += [(CHAT_TOKENS | SPECIAL_TOKENS)[part]] if n % 2 else ORACLE.encode(part)
    return ids


@settings(deadline=None, max_examples=300)
@given(WITH_CHAT_TOKENS)
@example(" a [USER]  b[SEP]\n[BOT] ")
@example(" a </s>  b<s>\n[BOT] </s>")
def test_tokens_in_any_text_are_those_of_the_original(text):
    ids = CHAT(text)["input_ids"]
    assert ids == [1, *ids_of_the_original(text)]
    assert CHAT.convert_tokens_to_ids(CHAT.tokenize(text)) == ids[1:]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.integers(3, 4006), st.integers(3, 258)), max_size=20))
@example([236, 156, 152, 236, 156])  # a whole character and a part of one
def test_any_ids_decode_as_sentencepiece_decodes_them(ids):
    assert PLAIN.decode(ids) == ORACLE.decode(ids)


# What the original class gave on transformers 4.33.3, with `skip_special_tokens` False and True.
@pytest.mark.parametrize(
    ("ids", "text", "without_special"),
    [
        ([1, 361, 2, 1, 361], "<s> The</s><s>The", "The The"),
        ([361, 2], " The</s>", "The"),
        ([1, 0, 361, 0], "<s><unk> The<unk>", "The"),
        ([361, 0, 0, 361], " The<unk><unk>The", "The The"),
        ([2, 1, USER, 361, SEP, BOT, 361, 2], "</s><s> [USER] The [SEP] [BOT]  The</s>", "[USER] The [SEP] [BOT] The"),
        ([1, USER, 2705, BOT, 318, 361], "<s> [USER]  [BOT]   The", "[USER]  [BOT]   The"),
        ([USER, BOT, 1, SEP], "[USER] [BOT] <s> [SEP]", "[USER] [BOT] [SEP]"),
        ([361, 233, 155], "The\ufffd\ufffd", "The\ufffd\ufffd"),
        ([13, 361], "\n The", "\n The"),
        ([2705], "", ""),
        ([], "", ""),
    ],
)
def test_special_and_chat_tokens_decode_as_in_the_original(ids, text, without_special):
    assert CHAT.decode(ids) == text
    assert CHAT.decode(ids, skip_special_tokens=True) == without_special


def test_other_ways_to_decode():
    assert CHAT.decode([USER, 361, BOT], spaces_between_special_tokens=False) == "[USER]The[BOT]"
    assert CHAT.decode(361) == "The"
    assert CHAT.decode([[361], [1, 361]], skip_special_tokens=True) == ["The", "The"]
    assert CHAT.decode([361, 99999]) == "The"  # a row of the model that no token has


def test_special_tokens_are_text_on_request(tokenizer):
    literal = [1, 954, *ORACLE.encode("x</s>")[1:]]
    assert tokenizer("x</s>")["input_ids"] == [1, 954, 2]
    assert tokenizer("x</s>", split_special_tokens=True)["input_ids"] == literal
    assert tokenizer("x</s>")["input_ids"] == [1, 954, 2]
    assert AutoTokenizer.from_pretrained(FOLDER, split_special_tokens=True)("x</s>")["input_ids"] == literal


@settings(deadline=None, max_examples=300)
@given(st.text("aé西🐉 \n", min_size=1, max_size=30))
def test_offsets_cover_the_text_in_order(text):
    offsets = PLAIN(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    starts = [start for start, _ in offsets]
    assert starts == sorted(starts)
    assert {place for start, end in offsets for place in range(start, end)} == set(range(len(text)))


def test_offsets_name_the_text_of_each_token():
    text = "The router 西安 [USER] x"
    encoded = CHAT(text, return_offsets_mapping=True)
    parts = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert parts == ["", "The", " r", "ou", "t", "er", " ", "西", "安", " [USER] ", "x"]
    assert encoded.char_to_token(text.index("安")) == 8


def test_batches_pad_on_the_left_with_unk(tokenizer):
    batch = tokenizer(["x", "how are you"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, 0, 1, 954], [1, 310, 360, 714]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_tokens_that_users_add(tokenizer, tmp_path):
    assert tokenizer.add_tokens(["<mine>"]) == 1
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]}) == 1
    tokenizer.save_pretrained(tmp_path)
    ids = [1, *ORACLE.encode("a "), 4007, 271, 4008, 954]
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.decode(ids, skip_special_tokens=True) == "a <mine> b x"
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded("a <mine>b<|im_end|>x")["input_ids"] == other.encode("a <mine>b<|im_end|>x").ids == ids
        assert loaded.decode(ids, skip_special_tokens=True) == "a  <mine> b x"
        assert [loaded.added_tokens_decoder[i].special for i in (4007, 4008)] == [False, True]


def test_a_new_tokenizer_from_new_text(tokenizer):
    new = tokenizer.train_new_from_iterator([["the first sentence", "a second sentence"]] * 20, 300)
    text = " a  first sentence</s>"
    assert new.decode(new(text)["input_ids"], skip_special_tokens=True).startswith(" a  first sentence")
    assert new.all_special_tokens == tokenizer.all_special_tokens
    assert new("")["input_ids"] == [new.bos_token_id]


# --- Files


def assert_same(one: SkyworkTokenizer, other: SkyworkTokenizer) -> None:
    assert type(one) is type(other) is SkyworkTokenizer
    for name in ("vocab", "padding_side", "special_tokens_map", "chat_template", "add_bos_token", "add_eos_token"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.added_tokens_decoder == other.added_tokens_decoder
    for text in ["a [USER] b", "  x </s>", "西安\n", ""]:
        assert one(text)["input_ids"] == other(text)["input_ids"]
        assert one.decode(one(text)["input_ids"]) == other.decode(other(text)["input_ids"])


@pytest.mark.parametrize("with_chat", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bos_token": False, "add_eos_token": True}], ids=["bos", "eos"])
def test_save_and_reload(with_chat, options, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, **options)
    if with_chat:
        tokenizer.add_chat_tokens()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "SkyworkTokenizer"
    assert not config.get("split_special_tokens")
    assert not config.keys() & {"auto_map", "legacy", "sp_model_kwargs", "is_local", "local_files_only"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert_same(again, tokenizer)
    again.save_pretrained(tmp_path / "again")
    assert_same(AutoTokenizer.from_pretrained(tmp_path / "again"), tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True)("x")["input_ids"][0] == 1


def test_copies(chat_tokenizer):
    assert_same(copy.deepcopy(chat_tokenizer), chat_tokenizer)
    assert_same(pickle.loads(pickle.dumps(chat_tokenizer)), chat_tokenizer)


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("loader", [AutoTokenizer, SkyworkTokenizer])
def test_one_file_is_enough(file, loader, tmp_path):
    saved, alone = tmp_path / "saved", tmp_path / "alone"
    PLAIN.save_pretrained(saved)
    alone.mkdir()
    shutil.copy((FOLDER if file == "tokenizer.model" else saved) / file, alone)
    if loader is AutoTokenizer:
        tiny_moe_config().save_pretrained(alone)
    assert_same(loader.from_pretrained(alone), PLAIN)


def test_straight_from_a_path():
    assert_same(SkyworkTokenizer(FOLDER / "tokenizer.model"), PLAIN)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model in what was given"):
        SkyworkTokenizer()


WITHOUT_SENTENCEPIECE = """
import sys
sys.modules.update(dict.fromkeys(["google.protobuf", "sentencepiece"]))  # neither can be imported any more
from transformers import AutoTokenizer
import skywork_hf
print(AutoTokenizer.from_pretrained(sys.argv[1])("how are you").input_ids)
"""


def test_neither_sentencepiece_nor_protobuf_is_needed():
    command = [sys.executable, "-c", WITHOUT_SENTENCEPIECE, str(FOLDER)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[1, 310, 360, 714]"


def test_pieces_are_those_that_sentencepiece_reads():
    pieces = _read_pieces(FOLDER / "tokenizer.model")
    assert len(pieces) == len(ORACLE)
    for i, (piece, score, kind) in enumerate(pieces):
        assert (piece, score) == (ORACLE.id_to_piece(i), ORACLE.get_score(i))
        assert (kind == 2, kind == 3, kind == 6) == (ORACLE.is_unknown(i), ORACLE.is_control(i), ORACLE.is_byte(i))


def test_other_programs_read_tokenizer_json(tmp_path):
    for tokenizer, rows in ((PLAIN, GOLDEN["plain"]), (CHAT, GOLDEN["after_chat_tokens"])):
        tokenizer.save_pretrained(tmp_path)
        other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        for row in rows:
            assert other(row["text"])["input_ids"] == row["ids"]
            if tokenizer is PLAIN:  # nothing else has spaces around chat tokens
                assert other.decode(row["ids"], skip_special_tokens=True) == row["decoded"]
    for row in GOLDEN["chat_special_encode"]:
        assert chat(other, row["prompt"]) == row["ids"]


def test_what_a_file_pads_to_is_not_taken_for_its_first_token(tmp_path):
    PLAIN.save_pretrained(tmp_path)
    padded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    padded.enable_padding(direction="left", pad_id=0, pad_token="<unk>", length=8)
    padded.save(str(tmp_path / "tokenizer.json"))
    assert_same(AutoTokenizer.from_pretrained(tmp_path), PLAIN)


@pytest.mark.parametrize("name", ["SkyworkTokenizer", "SkyworkTokenizerFast"])
def test_class_names_of_other_uploads(name, tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    shutil.copy(FOLDER / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is SkyworkTokenizer


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", CHAT_TOKENS),
        ("special_tokens_map.json", {"additional_special_tokens": list(CHAT_TOKENS)}),
        ("special_tokens_map.json", {"extra_special_tokens": list(CHAT_TOKENS)}),
        ("tokenizer_config.json", {"added_tokens_decoder": {i: {"content": t} for t, i in CHAT_TOKENS.items()}}),
    ],
)
def test_chat_tokens_in_files_of_the_slow_class(file, content, tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    tokenizer = SkyworkTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 4010
    for text in ["a [USER] b", "[SEP]a"]:
        assert tokenizer(text)["input_ids"] == [1, *ids_of_the_original(text)]
    for row in GOLDEN["chat_special_encode"]:
        assert chat(tokenizer, row["prompt"]) == row["ids"]


def test_added_tokens_out_of_place_are_named(tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[USER]": 4007, "[SEP]": 4012}))
    with pytest.raises(ValueError, match=r"gives the token \[SEP\] the id 4012; its place is 4008"):
        SkyworkTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [1, 3, 4], ids=["normal", "control", "user-defined"])
def test_chat_tokens_that_tokenizer_model_has_are_found(kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_model(*((token, -9999.0 - n, kind) for n, token in enumerate(CHAT_TOKENS)))
    )
    tokenizer = SkyworkTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 4010
    assert tokenizer.add_chat_tokens() == 0
    for row in GOLDEN["chat_special_encode"]:
        assert chat(tokenizer, row["prompt"]) == row["ids"]


def test_text_never_merges_into_a_control_token(tmp_path):
    """Real vocabularies have pieces such as `<s`, out of which a merge could make `<s>`."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(("<s", 1.0, 1), ("s>", 0.5, 1)))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = SkyworkTokenizer.from_pretrained(tmp_path)
    assert 1 not in oracle.encode("a<s>")
    for text in ["<s>", "a<s>", "</s>", "s><s"]:
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == [1, *oracle.encode(text)]


def test_merges_go_by_score_not_by_id(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(("西安的", 3.0, 1), ("安的", 2.0, 1)))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = SkyworkTokenizer.from_pretrained(tmp_path)
    text = "西安的省会，安的"
    assert tokenizer(text)["input_ids"] == [1, *oracle.encode(text)]
    assert tokenizer.tokenize(text).count("安的") == 1


def test_pieces_of_one_score_give_a_warning(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(("西安", 3.0, 1), ("安的", 3.0, 1)))
    with CaptureLogger(logger) as captured:
        SkyworkTokenizer.from_pretrained(tmp_path)
    assert "share a score" in captured.out


BROKEN = {
    "empty": b"",
    "text": b"not a model at all",
    "cut": (FOLDER / "tokenizer.model").read_bytes()[:1000],
    "long number": sentencepiece_model() + b"\x20" + b"\x80" * 10 + b"\x00",  # a mebibyte of them took long
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 994250\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("loader", [AutoTokenizer, SkyworkTokenizer])
def test_a_file_that_is_no_skywork_tokenizer_is_named(content, loader, tmp_path):
    tiny_dense_config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"tokenizer\.model is not a (SentencePiece model|Skywork tokenizer)"
    ) as error:
        loader.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert ("Git LFS" in str(error.value)) == content.startswith(b"version")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    fields = list(_fields((FOLDER / "tokenizer.model").read_bytes()))
    kept = [*fields[:3], *(field for field in fields if field[0] != PIECES)]
    whole = b"".join(varint(number << 3 | 2) + varint(len(value)) + value for number, value in kept)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(whole)
    assert len(_read_pieces(path)) == 3
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.model is not a (SentencePiece model|Skywork tokenizer)"):
            _read_pieces(path)


def test_a_piece_that_would_take_a_gibibyte_to_cut_up_is_refused(tmp_path):
    name = b"a" * 30_000
    piece = b"\x0a" + varint(len(name)) + name
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model() + b"\x0a" + varint(len(piece)) + piece)
    with pytest.raises(ValueError, match=r"tokenizer\.model has a piece of 30000 characters; .* more than 512"):
        SkyworkTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [AutoTokenizer, SkyworkTokenizer])
def test_a_missing_file_is_named(loader, tmp_path):
    tiny_dense_config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no tokenizer\.model in .*{Path(tmp_path).name}"):
        loader.from_pretrained(tmp_path)


# --- Chats


@pytest.mark.parametrize("row", GOLDEN["chat_special_encode"], ids=lambda row: row["prompt"][:20])
def test_golden_chats(row):
    assert len(CHAT) == GOLDEN["len_after_chat_tokens"]
    assert chat(CHAT, row["prompt"]) == row["ids"]
    rendered = CHAT.apply_chat_template(messages(row["prompt"]), tokenize=False)
    assert CHAT(rendered, add_special_tokens=False)["input_ids"] == row["ids"]
    assert CHAT(rendered)["input_ids"] == [1, *row["ids"]]


def special_encode(prompt: str) -> list[int]:
    """What the function of the original repository gives, but for white space around a literal `[SEP]`."""
    return [2, *ids_of_the_original(f"<s>[USER]{prompt.strip()}[SEP][BOT]".replace("\r", ""))]


@settings(deadline=None, max_examples=300)
@given(st.one_of(ANY_TEXT, WITH_CHAT_TOKENS))
@example("a [SEP] b")
@example("</s>[USER] <s>")
@example("<\r/s>[US\rER]")
def test_any_question_gives_the_ids_of_special_encode(prompt):
    if "\0" not in prompt:
        assert chat(CHAT, prompt) == special_encode(prompt)


def test_a_conversation():
    ids = chat(CHAT, "how are you", "x", "how")
    assert ids == [2, 1, USER, 310, 360, 714, SEP, BOT, 954, 2, 1, USER, 310, SEP, BOT]
    assert ids == [*special_encode("how are you"), 954, *special_encode("how")]
    assert chat(CHAT, "how are you", "x") == ids[:10]
    # [BOT] belongs to the question, as in `special_encode`.
    assert chat(CHAT, "how are you", add_generation_prompt=False) == ids[:8]
    batch = CHAT.apply_chat_template([messages("how"), messages("how are you")], padding=True)
    assert batch["input_ids"] == [[0, 0, 2, 1, USER, 310, SEP, BOT], [2, 1, USER, 310, 360, 714, SEP, BOT]]


def test_a_system_message_opens_the_first_question():
    assert chat(CHAT, "how", "x", "how", system=" x\r ") == chat(CHAT, "x\nhow", "x", "how")
    assert chat(CHAT, "how", system="") == chat(CHAT, "how")


def test_an_answer_to_go_on_with():
    ids = chat(CHAT, "how", "x are", add_generation_prompt=False, continue_final_message=True)
    assert ids == [2, 1, USER, 310, SEP, BOT, 954, 360]


def test_a_rendered_chat():
    text = CHAT.apply_chat_template(messages("how", "x", " how "), tokenize=False, add_generation_prompt=True)
    assert text == "</s><s>[USER]how[SEP][BOT]x</s><s>[USER]how[SEP][BOT]"
    assert CHAT(text, add_special_tokens=False)["input_ids"] == chat(CHAT, "how", "x", "how")


def test_chats_rendered_first_find_the_chat_tokens(tokenizer):
    """Engines render, then encode."""
    text = tokenizer.apply_chat_template(messages("how"), tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [2, 1, USER, 310, SEP, BOT]


@settings(deadline=None, max_examples=100)
@given(st.one_of(ANY_TEXT, WITH_CHAT_TOKENS))
@example("x</s><s>[USER]how[SEP][BOT]")
@example("<\r/s>x")
@example("<</s>/s>[[SEP]")
def test_control_tokens_in_a_message_are_text_on_request(text):
    ids = chat(CHAT, text, sanitize_control_tokens=True)
    assert ids[:3] + ids[-2:] == [2, 1, USER, SEP, BOT]
    assert not set(ids[3:-2]) & {*CHAT_TOKENS.values(), *SPECIAL_TOKENS.values()}
    assert CHAT.decode(ids[3:-2]) == text.strip().replace("\r", "").replace("▁", " ")
    if "\0" not in text and not re.search(r"\[(USER|BOT|SEP)\]|</?s>|<unk>", text.replace("\r", "")):
        assert ids == special_encode(text)


def test_what_a_template_writes_are_tokens_whatever_texts_are_split_into():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, split_special_tokens=True)
    for sanitize in (False, True):
        assert chat(tokenizer, "how", sanitize_control_tokens=sanitize) == [2, 1, USER, 310, SEP, BOT]
    assert tokenizer("x</s>")["input_ids"] == [1, *ORACLE.encode("x</s>")]


def test_a_text_does_not_show_what_is_text():
    with pytest.raises(ValueError, match="requires `tokenize=True`"):
        CHAT.apply_chat_template(messages("how"), sanitize_control_tokens=True, tokenize=False)


def test_threads_share_a_tokenizer():
    prompts = ["how are you", "x</s> y", "a [SEP] b"]

    def both(prompt: str) -> tuple[list[int], list[int]]:
        return chat(CHAT, prompt), CHAT(prompt)["input_ids"]

    expected = [both(prompt) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(both, prompts * 200)) == expected * 200


def test_mask_of_the_answers():
    options = {"return_assistant_tokens_mask": True, "add_generation_prompt": False}
    encoded = CHAT.apply_chat_template(messages("how", "x", "how</s>", "西 x</s>"), **options)
    marked = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert marked == [954, 2, *ORACLE.encode("西 x"), 2, 2]
    batch = CHAT.apply_chat_template([messages("how", ""), messages("how", "x x")], padding=True, **options)
    assert batch["assistant_masks"] == [[0] * 8 + [1], [0] * 6 + [1] * 3]


def roles(*names: str) -> list[dict[str, str]]:
    return [{"role": name, "content": "x"} for name in names]


@pytest.mark.parametrize(
    ("conversation", "complaint"),
    [
        (roles("assistant"), "message 1 has the role assistant, not user"),
        (roles("user", "user"), "message 2 has the role user, not assistant"),
        (roles("system", "user", "system"), "message 3 has the role system, not assistant"),
        (roles("user", "tool"), "message 2 has the role tool, not assistant"),
        (roles("system"), "none follows it"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has to be a string"),
        ([{"role": "user"}], "has to be a string"),
    ],
)
@pytest.mark.parametrize("tokenize", [True, False])
def test_chats_that_make_no_sense_are_refused(conversation, complaint, tokenize):
    with pytest.raises(TemplateError, match=complaint):
        CHAT.apply_chat_template(conversation, tokenize=tokenize)


def test_chat_tokens_come_with_the_first_chat(tokenizer):
    """The released chat models have rows for them; their tokenizers need not have them."""
    with CaptureLogger(logger) as captured:
        assert chat(tokenizer, "how") == [2, 1, USER, 310, SEP, BOT]
    assert "add_chat_tokens(model)" in captured.out
    assert len(tokenizer) == GOLDEN["len_after_chat_tokens"]
    with CaptureLogger(logger) as captured:
        chat(tokenizer, "how")
    assert not captured.out


def test_other_templates_need_no_chat_tokens(tokenizer):
    template = "{{ messages[0].content }}{{ eos_token }}"
    assert chat(tokenizer, "x", chat_template=template) == [954, 2]
    assert len(tokenizer) == 4007


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_adding_chat_tokens_gives_the_model_rows(family, tokenizer):
    config = tiny_dense_config(vocab_size=4007) if family == "dense" else tiny_moe_config(vocab_size=4007)
    model = (SkyworkForCausalLM if family == "dense" else SkyworkMoeForCausalLM)(config)
    old = model.get_input_embeddings().weight.detach().clone()
    assert tokenizer.add_chat_tokens(model) == 3
    assert tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS)) == [USER, BOT, SEP]
    assert len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == 4010
    assert model.get_input_embeddings().weight[:4007].equal(old)
    assert model(**tokenizer("[USER]x[SEP]", return_tensors="pt")).logits.shape[-1] == 4010
    assert model.config.vocab_size == 4010
    assert tokenizer.add_chat_tokens(model) == 0


def test_a_model_gets_rows_for_tokens_that_are_there_already(chat_tokenizer):
    model = SkyworkForCausalLM(tiny_dense_config(vocab_size=4007))
    assert chat_tokenizer.add_chat_tokens(model) == 0
    assert len(model.get_input_embeddings().weight) == 4010


def test_a_model_with_rows_to_spare_keeps_them(tokenizer):
    model = SkyworkForCausalLM(tiny_dense_config(vocab_size=4096))
    tokenizer.add_chat_tokens(model)
    assert len(model.get_input_embeddings().weight) == 4096
