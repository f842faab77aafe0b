"""Chats for supervised fine-tuning: files in three forms, and rows of ids whose labels are the answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..losses import IGNORED
from ..untrusted import parse_json

logger = logging.get_logger(__name__)

Messages = list[dict[str, str]]
_FORMS = (
    'expected {"messages": [{"role": ..., "content": ...}, ...]}, {"conversations": [{"from": ..., "value": ...}, '
    '...]} or {"instruction": ..., "output": ...}'
)
# What each form has, named by its first field; the rest is not read, and that is said.
_FIELDS = {
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
    "instruction": ("instruction", "input", "output", "system", "history"),
}
_TEXTS = {"instruction": str, "input": str | None, "output": str, "system": str | None}
_SHAREGPT_FIELDS = (("role", "from"), ("content", "value"))
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def read_conversations(file: str | Path) -> list[Messages]:
    """Read chats from a file with a JSON object in each line.

    A warning names fields that are not read, and says where answers are empty.

    Args:
        file: UTF-8; each line has one of three forms, each with a `system` message if need be, and user and assistant
            take turns:

            * `{"messages": [{"role": ..., "content": ...}, ...]}`, where a system message may stand first.
            * ShareGPT's `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}`.
            * Alpaca's `{"instruction": ..., "input": ..., "output": ...}`, where `input` may be missing or empty and
              otherwise stands below the instruction; `history` may hold earlier pairs of question and answer, as in
              LLaMA-Factory.

    Raises:
        ValueError: a line is something else; names the file and the line. Or there is none, or it is not UTF-8.
    """
    conversations: list[Messages] = []
    unread: set[str] = set()
    empty: list[int] = []
    try:
        # Line by line: `str.splitlines` also breaks at characters that JSON allows in its strings.
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    messages = _conversation(line, f"{file}, line {number}", unread)
                    conversations.append(messages)
                    if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
                        empty.append(number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8.") from error
    if not conversations:
        raise ValueError(f"{file} holds no rows: {_FORMS} in each line.")
    if unread:
        logger.warning(f"{file} has fields that are not read: {', '.join(sorted(unread))}.")
    if empty:
        logger.warning(
            f"{file} has an empty answer in {len(empty)} of {len(conversations)} conversations, the first in line "
            f"{empty[0]}: a model learns from it to say nothing."
        )
    return conversations


def _conversation(line: str, where: str, unread: set[str]) -> Messages:
    try:
        row = parse_json(line.encode())
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): {_FORMS}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}: {_FORMS}.")
    form, *others = [field for field in _FIELDS if field in row] or ["instruction"]
    if others:
        raise ValueError(f"{where} has both `{form}` and `{others[0]}`, so it is not clear which is meant: {_FORMS}.")
    unread.update(f"`{field}`" for field in row.keys() - set(_FIELDS[form]))
    for field in _FIELDS[form]:
        if not isinstance(row.get(field), _TEXTS.get(field, object)):
            raise ValueError(f"{where} has no text in `{field}`: {_FORMS}.")
    messages = _instruction(row, where) if form == "instruction" else _messages(row[form], form, where, unread)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return _checked([*system, *messages], where)


def _instruction(row: dict[str, Any], where: str) -> Messages:
    turns = row.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError(f"{where}: `history` is no list of pairs, a question and its answer.")
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    texts = [text for turn in [*turns, (question, row["output"])] for text in turn]
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return _messages(messages, "history", where, set())


def _messages(messages: Any, form: str, where: str, unread: set[str]) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: `{form}` is no list of messages: {_FORMS}.")
    read = []
    for message in messages:
        fields = dict(message) if isinstance(message, dict) else {}
        role, content = (fields.pop(name if name in fields else theirs, None) for name, theirs in _SHAREGPT_FIELDS)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{where}: {message!r} is no message with the texts `role` and `content`.")
        read.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
        unread.update(f"`{name}` of messages" for name in fields)
    return read


def _checked(messages: Messages, where: str) -> Messages:
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f'{where}: no message has the role "assistant", so there is no answer to learn.')
    has_system = messages[0]["role"] == "system"
    for place, message in enumerate(messages[has_system:]):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            raise ValueError(
                f'{where}: message {place + has_system + 1} has the role "{message["role"]}", not "{expected}": one '
                "system message or none, then user and assistant take turns."
            )
    return messages


def tokenize_conversations(
    tokenizer: Any, conversations: list[Messages], max_tokens: int | None = None
) -> list[dict[str, list[int]]]:
    """Rows for a Trainer, with the loss on the answers alone, by the tokenizer's chat template.

    Rows longer than `max_tokens` are cut at the end; those where no answer is left are left out. A warning says how
    many. `transformers.DataCollatorForSeq2Seq(tokenizer)` pads them.

    Args:
        tokenizer: a `SkyworkTokenizer`, or any whose chat template marks the answers (`{% generation %}`).
        max_tokens: None cuts nothing.

    Returns:
        For each row `input_ids`, `attention_mask` and `labels` of one length; labels are -100 outside the answers.

    Raises:
        ValueError: no row has a label to learn, the chat template marks no answers, or `max_tokens` is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens`={max_tokens}: expected at least 1, or None to cut nothing.")
    if not conversations:
        raise ValueError("There are no conversations to tokenize.")
    rows, cut, answered = [], 0, False
    for messages in conversations:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, answers = encoded["input_ids"], encoded["assistant_masks"]
        answered = answered or any(answers)
        cut += max_tokens is not None and len(ids) > max_tokens
        labels = [token if answer else IGNORED for token, answer in zip(ids, answers, strict=True)][:max_tokens]
        if any(label != IGNORED for label in labels[1:]):  # the first is no target
            ids = ids[:max_tokens]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not answered:
        raise ValueError(
            f"No token of {len(conversations)} conversations is marked as an answer's: they hold none, or the "
            "tokenizer's chat template has no `{% generation %}` around them."
        )
    if not rows:
        raise ValueError(
            f"None of {len(conversations)} conversations has an answer within {max_tokens} tokens, so there would be "
            "nothing to learn: allow more tokens."
        )
    if cut:
        logger.warning(
            f"{cut} of {len(conversations)} conversations are longer than {max_tokens} tokens and were cut."
        )
    if len(rows) < len(conversations):
        lost = len(conversations) - len(rows)
        logger.warning(f"{lost} of {len(conversations)} conversations have no answer left and were left out.")
    return rows
