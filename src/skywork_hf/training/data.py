"""Chats for supervised fine-tuning: files in two forms, and rows of ids whose labels are the answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..losses import IGNORED

logger = logging.get_logger(__name__)

Messages = list[dict[str, str]]
_FORMS = 'expected {"messages": [{"role": ..., "content": ...}, ...]} or {"instruction": ..., "output": ...}'


def read_conversations(file: str | Path) -> list[Messages]:
    """Read chats from a file with a JSON object in each line.

    Args:
        file: UTF-8; each line is `{"messages": [{"role": ..., "content": ...}, ...]}`, where a system message may
            stand first and then user and assistant take turns, or the Alpaca form,
            `{"instruction": ..., "input": ..., "output": ...}`, where `input` may be missing or empty and otherwise
            stands below the instruction.

    Raises:
        ValueError: a line is something else; names the file and the line. Or there is none, or it is not UTF-8.
    """
    conversations = []
    try:
        # Line by line: `str.splitlines` also breaks at characters that JSON allows in its strings.
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    conversations.append(_conversation(line, f"{file}, line {number}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8.") from error
    if not conversations:
        raise ValueError(f"{file} holds no rows: {_FORMS} in each line.")
    return conversations


def _conversation(line: str, where: str) -> Messages:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}): {_FORMS}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}: {_FORMS}.")
    if "messages" in row:
        return _checked(row["messages"], where)
    missing = [field for field in ("instruction", "output") if not isinstance(row.get(field), str)]
    if missing or not isinstance(row.get("input") or "", str):
        raise ValueError(f"{where} has no text in `{(missing or ['input'])[0]}`: {_FORMS}.")
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _checked(messages: Any, where: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: `messages` is no list of messages: {_FORMS}.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(f), str) for f in ("role", "content")):
            raise ValueError(f"{where}: {message!r} is no message with the texts `role` and `content`.")
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
