"""The tokenizer of the Skywork models, a SentencePiece BPE on the tokenizers library, and their chat format."""

from __future__ import annotations

import codecs
import copy
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import TokenizersBackend
from transformers.utils import logging

from .compat import SANITIZES_CHATS, reader_of_hidden_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

CHAT_TOKENS = ("[USER]", "[BOT]", "[SEP]")  # in the order of their ids

# A question is `</s><s>[USER]question[SEP][BOT]`. The `</s>` of the next one ends the answer before it.
CHAT_TEMPLATE = """\
{%- macro text(message) -%}
    {%- if message.content is not string -%}
        {{- raise_exception('Skywork chats are text: the content of every message has to be a string.') -}}
    {%- endif -%}
    {{- message.content | replace('\\r', '') | trim -}}
{%- endmacro -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- set system = text(messages[0]) if has_system else '' -%}
{%- if not turns -%}
    {{- raise_exception('In a Skywork chat, a system message opens a user message, and none follows it.') -}}
{%- endif -%}
{{- eos_token -}}
{%- for message in turns -%}
    {%- set expected = 'user' if loop.index0 is even else 'assistant' -%}
    {%- if message.role != expected -%}
        {{- raise_exception('A Skywork chat has one system message or none, then user and assistant take turns: '
            ~ 'message ' ~ (loop.index + (1 if has_system else 0)) ~ ' has the role ' ~ message.role ~ ', not '
            ~ expected ~ '.') -}}
    {%- elif expected == 'user' -%}
        {{- bos_token ~ '[USER]' ~ (system ~ '\\n' if loop.first and system else '') ~ text(message) -}}
        {{- '[SEP][BOT]' -}}
    {%- else -%}
        {% generation %}
            {{- text(message) ~ eos_token -}}
        {% endgeneration %}
    {%- endif -%}
{%- endfor -%}
"""

SPACE = "▁"  # as SentencePiece writes it
BYTE = re.compile("<0x[0-9A-F]{2}>")

# SentencePiece has a replacement character for every byte that is no UTF-8, and not for every sequence.
EACH_BYTE = "skywork_hf.replace_each_byte"
codecs.register_error(EACH_BYTE, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore


class SkyworkTokenizer(TokenizersBackend):
    """
    The ids and the decoded text of the original `SkyworkTokenizer`, a slow class of 2023 on the sentencepiece library,
    from `tokenizer.model` or `tokenizer.json` alone. Neither sentencepiece nor protobuf is needed.

    Habits of the original that most tokenizers do not have:

    * White space is kept as it is, around special tokens too. Only `[USER]`, `[BOT]` and `[SEP]` swallow it. A space
      that is not in the text goes before every stretch of text between tokens.
    * In decoded text one space separates added tokens from the rest (`spaces_between_special_tokens=False`: none).

    Chats: the template writes `</s><s>[USER]question[SEP][BOT]`, with the ids of the original `special_encode`,
    whatever `add_generation_prompt` says, then `answer</s><s>[USER]question[SEP][BOT]`. A system message opens the
    first question, on lines of its own. The assistant mask covers each answer and its `</s>`. Messages lose white
    space at both ends and all `\\r`. Tokens in them are tokens; `sanitize_control_tokens=True` makes text of them.

    Args:
        vocab: the path of `tokenizer.model`, or the pieces and their ids, to go with `merges`.
        merges: pairs of pieces, the first to merge first.
        pad_token: the unknown token unless given.
        kwargs: as for every tokenizer. Unless a `tokenizer.json` says otherwise, `add_bos_token` is True and
            `add_eos_token` False.

    Raises:
        FileNotFoundError: there is no `tokenizer.json` and no `tokenizer.model`.
        ValueError: `tokenizer.model` is no SentencePiece BPE model, or added tokens do not follow one another.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    model = BPE  # type: ignore[assignment]
    _tokenizer: Tokenizer  # type: ignore[assignment]

    def __init__(
        self,
        vocab: str | os.PathLike[str] | dict[str, int] | None = None,
        merges: list[tuple[str, str]] | None = None,
        unk_token: str | AddedToken | None = "<unk>",
        bos_token: str | AddedToken | None = "<s>",
        eos_token: str | AddedToken | None = "</s>",
        pad_token: str | AddedToken | None = None,
        **kwargs: Any,
    ) -> None:
        # Of the original class, and of the way here.
        for name in ("auto_map", "legacy", "sp_model_kwargs", "is_local", "local_files_only"):
            kwargs.pop(name, None)
        if kwargs.get("tokenizer_object") is not None:
            kwargs.pop("added_tokens_decoder", None)  # of the tokenizer that this one was trained after
        ready_made = any(kwargs.get(name) is not None for name in ("tokenizer_object", "tokenizer_file"))
        if not ready_made:
            if not isinstance(vocab, dict):
                kwargs["vocab_file"] = kwargs.get("vocab_file") if vocab is None else str(vocab)
                vocab, merges, kwargs["added_tokens_decoder"] = _read_sentencepiece(**kwargs)
            self._tokenizer = _tokenizer(vocab, merges or [])
            kwargs = {"add_bos_token": True, "add_eos_token": False, **kwargs}
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = CHAT_TEMPLATE
        pad_token = unk_token if pad_token is None else pad_token
        super().__init__(unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **kwargs)
        added = {token.content: token for token in self.added_tokens_decoder.values()}
        known = [name for name in CHAT_TOKENS if self._tokenizer.token_to_id(name) is not None]
        self.add_tokens([added.get(name, name) for name in known])
        if ready_made:
            self._read_post_processor(given=kwargs)
        self._check_ids(kwargs.get("added_tokens_decoder") or {})

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Ours for `tokenizer.model`, see `_read_sentencepiece`. A `tokenizer.json` is taken as it is."""
        if kwargs.get("tokenizer_file") is None:
            kwargs["vocab"], kwargs["merges"], kwargs["added_tokens_decoder"] = _read_sentencepiece(**kwargs)
        return kwargs

    def _read_post_processor(self, given: dict[str, Any]) -> None:
        # A `tokenizer.json` adds bos and eos or does not, and transformers does not look. Not by the backend, which
        # pads as the file says, to any length.
        ids = self("")["input_ids"]
        if "add_bos_token" not in given:
            self._add_bos_token = self.bos_token is not None and ids[:1] == [self.bos_token_id]
        if "add_eos_token" not in given:
            self._add_eos_token = self.eos_token is not None and ids[-1:] == [self.eos_token_id]

    def _check_ids(self, added_tokens: dict[int, AddedToken]) -> None:
        for wanted, token in added_tokens.items():
            index = self._tokenizer.token_to_id(str(token))
            if index != int(wanted):
                raise ValueError(f"{self.name_or_path} gives the token {token} the id {wanted}; its place is {index}.")

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        tokens = [AddedToken(token) if isinstance(token, str) else token for token in new_tokens]
        return self._tokenizer.add_tokens([_as_original(token, special_tokens) for token in tokens])

    def add_chat_tokens(self, model: PreTrainedModel | None = None) -> int:
        """
        Add those of `[USER]`, `[BOT]` and `[SEP]` that are missing, and the rows that `model` has not got for them.

        Returns:
            The number of tokens added. A model that has rows for all tokens is left alone.
        """
        before = len(self)
        self.add_tokens([token for token in CHAT_TOKENS if token not in self.added_tokens_encoder])
        if model is not None:
            embeddings: Any = model.get_input_embeddings()
            if len(embeddings.weight) < len(self):
                model.resize_token_embeddings(len(self))
        return len(self) - before

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As for every tokenizer; the class describes the format. Chat tokens that the template needs and the tokenizer
        has not got are added, with a warning.

        Raises:
            jinja2.exceptions.TemplateError: the messages are not in the order of a chat, or not text.
        """
        template = self.get_chat_template(chat_template, tools)
        if any(token in template and token not in self.added_tokens_encoder for token in CHAT_TOKENS):
            self.add_chat_tokens()
            logger.warning(
                f"{', '.join(CHAT_TOKENS)} were added to the tokenizer, which has {len(self)} tokens now. A model "
                "with fewer rows, as base models have, gets its rows by `tokenizer.add_chat_tokens(model)`."
            )
        how = (chat_template, add_generation_prompt, continue_final_message, tokenize)
        if self.split_special_tokens:  # in texts; what a template writes are tokens
            reader = copy.copy(self)
            reader.split_special_tokens = False
            return reader.apply_chat_template(conversation, tools, documents, *how, sanitize_control_tokens, **kwargs)
        if not sanitize_control_tokens:
            return super().apply_chat_template(conversation, tools, documents, *how, **kwargs)
        # The template removes `\r`, and what they divide must not become a token once tokens were looked for.
        conversation = _changed(conversation, lambda text: text.replace("\r", ""))
        if SANITIZES_CHATS:
            return super().apply_chat_template(conversation, tools, documents, *how, True, **kwargs)
        reader, hide = reader_of_hidden_names(self, tokenize)
        conversation, tools, documents = (_changed(said, hide) for said in (conversation, tools, documents))
        return reader.apply_chat_template(conversation, tools, documents, *how, **kwargs)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any) -> Any:
        # transformers' has the white space that a token swallowed in the token.
        encoded = self(text, pair, add_special_tokens=add_special_tokens, **kwargs)
        return self.convert_ids_to_tokens(encoded["input_ids"])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens)
        string, text = "", []
        for token in tokens:
            if token not in special:
                text.append(token)
                continue
            # The original puts the space before the text, not between the text and the special token.
            string += (" " if text else "") + _decoded(text) + token
            text = []
        return string + _decoded(text)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        # Not by the decoder of the tokenizers library: it knows nothing of these spaces, and where bytes in a row hold
        # an incomplete character, it gives up all of them.
        ids: Any = token_ids["input_ids"] if isinstance(token_ids, dict) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        tokens = [token for token in self.convert_ids_to_tokens(ids, skip_special_tokens) if token is not None]
        added = {token for token, index in self.added_tokens_encoder.items() if index >= self.vocab_size}
        strings: list[str] = []
        for is_added, run in groupby(tokens, key=added.__contains__):
            names = list(run)
            strings += names if is_added else [self.convert_tokens_to_string(names)]
        string = (" " if spaces_between_special_tokens else "").join(strings)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(string) if clean_up_tokenization_spaces else string


def _as_original(token: AddedToken, special: bool) -> AddedToken:
    # normalized: the normalizer would put the space that begins a text into the token
    state = {**token.__getstate__(), "normalized": False, "special": special or token.special}
    if token.content in CHAT_TOKENS:
        state["lstrip"] = state["rstrip"] = True
    return AddedToken(**state)


def _changed(said: Any, change: Callable[[str], str]) -> Any:
    """The same messages with their texts changed."""
    said = getattr(said, "messages", said)
    if isinstance(said, Mapping):
        return {key: _changed(value, change) for key, value in said.items()}
    if isinstance(said, (list, tuple)):
        return [_changed(item, change) for item in said]
    return change(said) if isinstance(said, str) else said


def _decoded(pieces: list[str]) -> str:
    """The text of pieces as SentencePiece decodes it: without the space that begins it."""
    data = b"".join(
        bytes([int(piece[3:5], 16)]) if BYTE.fullmatch(piece) else piece.replace(SPACE, " ").encode()
        for piece in pieces
    )
    return data[any(piece.startswith(SPACE) for piece in pieces[:1]) :].decode(errors=EACH_BYTE)


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """No pre-tokenizer: the Metaspace one, which Llama has, adds no space to a text that begins with one."""
    bpe = BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback="<0x00>" in vocab)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return tokenizer


# The numbers in https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
NORMAL, USER_DEFINED = 1, 4  # types of pieces
MODEL_TYPE, BPE_MODEL = 3, 2
PRECOMPILED_CHARSMAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 2, 3, 4

MAX_PIECE = 512  # characters, the most that SentencePiece's trainer can be told: cutting them up takes squares of that
MAX_VARINT = 10  # bytes, of protobuf's 64 bits


def _read_sentencepiece(
    vocab_file: str | os.PathLike[str] | None = None,
    name_or_path: str = "",
    added_tokens_decoder: dict[int, AddedToken] | None = None,
    **_: Any,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]:
    """
    The vocabulary and the merges in a `tokenizer.model`, and the added tokens with those that the file defines.

    Two pieces merge if the result is a normal piece, the one with the highest score first. (transformers takes the
    order of the ids for that of the scores, and makes `<s>` from text where its parts happen to be pieces.)
    """
    if vocab_file is None:
        raise FileNotFoundError(
            f"There is no tokenizer.json and no tokenizer.model in {name_or_path or 'what was given'}."
        )
    pieces = _read_pieces(Path(vocab_file))
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    longest = max(map(len, scores), default=0)
    if longest > MAX_PIECE:
        raise ValueError(
            f"{vocab_file} has a piece of {longest} characters; SentencePiece makes none of more than {MAX_PIECE}."
        )
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    results = {left + right for left, right in merges}
    if len({scores[piece] for piece in results}) < len(results):
        logger.warning(
            f"Pieces of {vocab_file} share a score. SentencePiece merges the leftmost of them first, the tokenizers "
            "library the one with the lowest id: where two of them overlap in a text, ids can differ from the "
            "original's."
        )
    defined = {i: AddedToken(piece) for i, (piece, _, kind) in enumerate(pieces) if kind == USER_DEFINED}
    vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    return vocab, merges, {**defined, **(added_tokens_decoder or {})}


def _read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """The pieces of a SentencePiece model, in the order of their ids, with their scores and types."""
    data = path.read_bytes()
    pieces: list[tuple[str, float, int]] = []
    specs: dict[int, dict[int, Any]] = {TRAINER_SPEC: {}, NORMALIZER_SPEC: {}}
    try:
        for number, value in _fields(data):
            if number == PIECES:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(SCORE, bytes(4)))
                pieces.append((piece[PIECE].decode(), score, piece.get(TYPE, NORMAL)))
            elif number in specs:
                specs[number] = dict(_fields(value))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        pointer = data.startswith(b"version https://git-lfs")
        hint = "it is a pointer of Git LFS, so fetch the file itself" if pointer else "it is damaged or something else"
        raise ValueError(f"{path} is not a SentencePiece model: {hint}.") from error
    trainer, normalizer = specs.values()
    is_bpe = trainer.get(MODEL_TYPE) == BPE_MODEL
    keeps_text = not normalizer.get(PRECOMPILED_CHARSMAP) and not normalizer.get(REMOVE_EXTRA_WHITESPACES, True)
    if not (pieces and is_bpe and keeps_text and normalizer.get(ADD_DUMMY_PREFIX, True)):
        raise ValueError(
            f"{path} is not a Skywork tokenizer: that is a SentencePiece model of the BPE kind that puts a space "
            "before a text and changes nothing else."
        )
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: their numbers, and their values as integers or bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        value: Any = None
        if wire_type in (0, 2):
            value, position = _varint(message, position)
        if wire_type:
            size = value if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            value, position = message[position : position + size], position + size
            if position > len(message):
                raise ValueError("The message ends early.")
        yield number, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for place in range(MAX_VARINT):
        byte = message[position + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, position + place + 1
    raise ValueError(f"A number has more than {MAX_VARINT} bytes.")
