"""Chats as training data: the forms of files, labels on the answers alone, and what is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import checkpoint, tiny_dense_config
from transformers import DataCollatorForSeq2Seq
from transformers.testing_utils import CaptureLogger

from skywork_hf import SkyworkForCausalLM, SkyworkTokenizer
from skywork_hf.demo import trained_checkpoint
from skywork_hf.training import read_conversations, tokenize_conversations
from skywork_hf.training.data import IGNORED, logger

TOKENIZER = SkyworkTokenizer.from_pretrained(checkpoint("skywork-13b-tiny"))
TOKENIZER.add_chat_tokens()
QUESTION = {"role": "user", "content": "法国的首都是哪里？"}
ANSWER = {"role": "assistant", "content": "巴黎。"}
CHAT = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, {"role": "user", "content": "2 + 3?"}]
CHAT.append({"role": "assistant", "content": "2 + 3 = 5"})


def written(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def test_all_forms_are_the_same_chat(tmp_path):
    plain = {"instruction": QUESTION["content"], "output": ANSWER["content"]}
    sharegpt = [{"from": "human", "value": QUESTION["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    rows = [plain, plain | {"input": ""}, plain | {"input": None, "system": "", "history": []}, ""]
    rows += [{"messages": [QUESTION, ANSWER]}, {"conversations": sharegpt}, {"conversations": [QUESTION, ANSWER]}]
    with CaptureLogger(logger) as said:
        assert read_conversations(written(tmp_path / "rows.jsonl", *rows)) == [[QUESTION, ANSWER]] * 6
    assert not said.out


def test_systems_and_histories_are_read(tmp_path):
    system, *turns = CHAT
    texts = [message["content"] for message in turns]
    alpaca = {"instruction": texts[2], "output": texts[3], "system": system["content"], "history": [texts[:2]]}
    names = ("human", "gpt")
    sharegpt = [{"from": names[place % 2], "value": text} for place, text in enumerate(texts)]
    first = {"from": "system", "value": system["content"]}
    rows = [alpaca, {"system": system["content"], "messages": turns}, {"conversations": [first, *sharegpt]}]
    rows.append({"conversations": sharegpt, "system": system["content"]})
    assert read_conversations(written(tmp_path / "rows.jsonl", *rows)) == [CHAT] * 4


def test_what_is_not_read_and_what_is_empty_is_said(tmp_path):
    weighed = {"messages": [QUESTION, ANSWER | {"from": "x", "weight": 0}], "tools": "[]"}
    rows = [weighed, {"instruction": "2 + 3", "output": " ", "id": 7}, {"messages": [QUESTION, ANSWER], "id": 8}]
    with CaptureLogger(logger) as said:
        chats = read_conversations(written(tmp_path / "rows.jsonl", *rows))
    assert chats[::2] == [[QUESTION, ANSWER]] * 2
    assert (
        "rows.jsonl has fields that are not read: `from` of messages, `id`, `tools`, `weight` of messages." in said.out
    )
    assert "rows.jsonl has an empty answer in 1 of 3 conversations, the first in line 2" in said.out


def test_an_input_stands_below_its_instruction(tmp_path):
    file = written(tmp_path / "rows.jsonl", {"instruction": "Add.", "input": "2 + 3", "output": "5"})
    assert read_conversations(file) == [
        [{"role": "user", "content": "Add.\n2 + 3"}, {"role": "assistant", "content": "5"}]
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ([QUESTION, ANSWER], "is a list"),
        ({"prompt": "2 + 3", "completion": "5"}, "has no text in `instruction`"),
        ({"instruction": "2 + 3"}, "has no text in `output`"),
        ({"instruction": "2 + 3", "output": 5}, "has no text in `output`"),
        ({"instruction": "Add.", "input": ["2", "3"], "output": "5"}, "has no text in `input`"),
        ({"messages": "2 + 3"}, "`messages` is no list of messages"),
        ({"messages": []}, "`messages` is no list of messages"),
        ({"conversations": {}}, "`conversations` is no list of messages"),
        ({"conversations": [{"from": "human"}]}, "is no message with the texts `role` and `content`"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "tool", "value": "5"}] * 2}, "no message has"),
        ({"messages": [QUESTION, ANSWER], "instruction": "x"}, "has both `messages` and `instruction`"),
        ({"instruction": "2 + 3", "output": "5", "system": ["x"]}, "has no text in `system`"),
        ({"instruction": "2 + 3", "output": "5", "history": ["x", "y"]}, "`history` is no list of pairs"),
        ({"instruction": "2 + 3", "output": "5", "history": [["x", None]]}, "None} is no message"),
        ({"instruction": "2 + 3", "input": 0, "output": "5"}, "has no text in `input`"),
        ({"messages": CHAT, "system": "x"}, 'message 2 has the role "system", not "user"'),
        ("[" * 100_000, "is not JSON"),
        ('{"instruction": "\\ud83d", "output": "x"}', "is not JSON"),
        ({"messages": [QUESTION, {"role": "assistant", "text": "5"}]}, "is no message"),
        ({"messages": [QUESTION, "5"]}, "is no message"),
        ({"messages": [QUESTION]}, 'no message has the role "assistant"'),
        ({"messages": [ANSWER, QUESTION]}, 'message 1 has the role "assistant", not "user"'),
        ({"messages": [QUESTION, QUESTION, ANSWER]}, 'message 2 has the role "user", not "assistant"'),
        ({"messages": [CHAT[0], ANSWER]}, 'message 2 has the role "assistant", not "user"'),
        ({"messages": [QUESTION, ANSWER, CHAT[0]]}, 'message 3 has the role "system", not "user"'),
    ],
)
def test_a_row_without_what_it_needs_is_named(line, message, tmp_path):
    good = {"messages": [QUESTION, ANSWER]}
    file = written(tmp_path / "rows.jsonl", good, "", line)
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3.*{message}"):
        read_conversations(file)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_what_only_python_breaks_lines_at_is_text(character, tmp_path):
    row = {"instruction": f"one{character}two", "output": "3"}
    text = json.dumps(row, ensure_ascii=character < " ")  # JSON allows all but control characters as they are
    (chat,) = read_conversations(written(tmp_path / "rows.jsonl", text))
    assert chat[0]["content"] == row["instruction"]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_read(ends, tmp_path):
    line = json.dumps({"messages": [QUESTION, ANSWER]}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes((line + ends + line + ends).encode("utf-8-sig"))
    assert read_conversations(tmp_path / "rows.jsonl") == [[QUESTION, ANSWER]] * 2


def test_another_encoding_is_refused_by_name(tmp_path):
    line = json.dumps({"messages": [QUESTION, ANSWER]}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(line.encode("gbk"))
    with pytest.raises(ValueError, match=r"rows\.jsonl is not UTF-8 .*: save it as UTF-8"):
        read_conversations(tmp_path / "rows.jsonl")


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no rows"):
        read_conversations(written(tmp_path / "rows.jsonl", "", ""))


def test_labels_are_the_answers_and_their_ends():
    (row,) = tokenize_conversations(TOKENIZER, [CHAT])
    assert row["input_ids"] == TOKENIZER.apply_chat_template(CHAT)["input_ids"]
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert TOKENIZER.decode(learnt).replace(" ", "") == "巴黎。</s>2+3=5</s>"


def test_the_loss_is_that_of_the_answers():
    torch.manual_seed(0)
    model = SkyworkForCausalLM(tiny_dense_config(vocab_size=len(TOKENIZER), max_position_embeddings=128)).eval()
    rows = tokenize_conversations(TOKENIZER, [CHAT, [QUESTION, ANSWER]])
    batch = DataCollatorForSeq2Seq(TOKENIZER)(rows)
    assert batch["input_ids"].shape[0] == 2  # of two lengths, so one is padded
    losses: list[torch.Tensor] = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        predictions = model(ids[None]).logits[0].log_softmax(-1)
        losses += [
            -predictions[place - 1, ids[place]] for place, label in enumerate(row["labels"]) if label != IGNORED
        ]
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())


@given(st.integers(1, 60))
def test_a_cut_row_is_the_beginning_of_the_whole_one(max_tokens):
    (whole,) = tokenize_conversations(TOKENIZER, [CHAT])
    first_answer = next(place for place, label in enumerate(whole["labels"]) if label != IGNORED)
    if max_tokens <= first_answer:
        with pytest.raises(ValueError, match=f"None of 1 conversations has an answer within {max_tokens} tokens"):
            tokenize_conversations(TOKENIZER, [CHAT], max_tokens)
    else:
        assert tokenize_conversations(TOKENIZER, [CHAT], max_tokens) == [
            {name: values[:max_tokens] for name, values in whole.items()}
        ]


def test_what_is_cut_and_what_is_left_out_is_said():
    short, longer = [QUESTION, ANSWER], [QUESTION, ANSWER, *CHAT[3:]]
    unanswered = [{"role": "user", "content": "为什么？" * 50}, ANSWER]
    tokens = len(TOKENIZER.apply_chat_template(short)["input_ids"])
    with CaptureLogger(logger) as said:
        rows = tokenize_conversations(TOKENIZER, [short, unanswered, longer], tokens)
    assert rows == tokenize_conversations(TOKENIZER, [short, short])
    assert f"2 of 3 conversations are longer than {tokens} tokens and were cut" in said.out
    assert "1 of 3 conversations have no answer left and were left out" in said.out
    with CaptureLogger(logger) as said:
        assert len(tokenize_conversations(TOKENIZER, [short, unanswered, longer])) == 3
    assert not said.out


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_length_that_holds_nothing_is_refused(max_tokens):
    with pytest.raises(ValueError, match=f"`max_tokens`={max_tokens}: expected at least 1"):
        tokenize_conversations(TOKENIZER, [CHAT], max_tokens)


def test_no_conversations_and_no_answers_are_refused():
    with pytest.raises(ValueError, match="There are no conversations"):
        tokenize_conversations(TOKENIZER, [])
    with pytest.raises(ValueError, match="No token of 1 conversations is marked as an answer's: they hold none, or"):
        tokenize_conversations(TOKENIZER, [[QUESTION]])


def test_a_template_that_marks_no_answers_is_refused():
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"chat template has no `\{% generation %\}` around them"):
        tokenize_conversations(tokenizer, [CHAT])


def test_templates_mark_answers_in_the_spelling_that_others_look_for():
    bundled = SkyworkTokenizer.from_pretrained(trained_checkpoint())
    for template in (TOKENIZER.chat_template, bundled.chat_template):
        assert "{% generation %}" in template  # TRL looks for this text
        assert "{% endgeneration %}" in template
