"""The tokenizer of the Skywork models, a SentencePiece BPE on the tokenizers library, and their chat format."""

from __future__ import annotations

import copy
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import TokenizersBackend
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

CHAT_TOKENS = ("[USER]", "[BOT]", "[SEP]")  # in the order of their ids
SEP = CHAT_TOKENS[2]

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


class SkyworkTokenizer(TokenizersBackend):
    """
    The ids and the decoded text of the original `SkyworkTokenizer`, a slow class of 2023 on the sentencepiece library,
    from `tokenizer.model` or `tokenizer.json` alone. Neither sentencepiece nor protobuf is needed.

    Habits of the original that most tokenizers do not have:

    * White space is kept as it is. A space that is not in the text goes before every stretch of text between tokens.
    * `<s>`, `</s>` and `<unk>` in a text are text. `split_special_tokens=False`, here, in `from_pretrained` or in a
      call, makes them tokens.
    * Tokens that `add_tokens` gets as strings swallow the white space around them in a text. In decoded text one space
      separates them from the rest (`spaces_between_special_tokens=False`: none).

    Chats: `apply_chat_template` writes `</s><s>[USER]question[SEP][BOT]`, with the ids of the original
    `special_encode`; `[BOT]` belongs to the question, whatever `add_generation_prompt` says. Further turns follow as
    `answer</s><s>[USER]question[SEP][BOT]`. A system message stands at the start of the first question, on lines of
    its own. The assistant mask covers each answer and the `</s>` after it. Messages lose white space at both ends and
    all `\\r`. Special tokens in messages are text and chat tokens are tokens, as they were;
    `sanitize_control_tokens=True` makes all of them text. A rendered chat (`tokenize=False`) does not show which is
    which, so let `apply_chat_template` tokenize.

    Args:
        vocab: the path of `tokenizer.model`, or the pieces and their ids, to go with `merges`.
        merges: pairs of pieces, the first to merge first.
        pad_token: the unknown token unless given.
        split_special_tokens: whether special tokens in a text are text.
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
        split_special_tokens: bool = True,
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
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=unk_token if pad_token is None else pad_token,
            split_special_tokens=split_special_tokens,
            **kwargs,
        )
        self.add_tokens([token for token in CHAT_TOKENS if self._tokenizer.token_to_id(token) is not None])
        if ready_made:
            self._read_post_processor(given=kwargs)
        self._check_ids(kwargs.get("added_tokens_decoder") or {})

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Ours for `tokenizer.model`, see `_read_sentencepiece`. A `tokenizer.json` is taken as it is."""
        if kwargs.get("tokenizer_file") is None:
            if kwargs.get("vocab_file") is None:
                where = kwargs.get("name_or_path")
                raise FileNotFoundError(f"There is no tokenizer.json and no tokenizer.model in {where}.")
            kwargs["vocab"], kwargs["merges"], kwargs["added_tokens_decoder"] = _read_sentencepiece(**kwargs)
        return kwargs

    def _read_post_processor(self, given: dict[str, Any]) -> None:
        # A `tokenizer.json` adds bos and eos or does not, and transformers does not look.
        ids = self._tokenizer.encode("").ids
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
        return self._tokenizer.add_tokens([self._as_original(token, special_tokens) for token in new_tokens])

    def _as_original(self, token: str | AddedToken, special: bool) -> AddedToken:
        strips = isinstance(token, str) or token.content in CHAT_TOKENS
        token = AddedToken(token) if isinstance(token, str) else token
        return AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=strips or token.lstrip,
            rstrip=strips or token.rstrip,
            # else the normalizer puts the space that begins a text into the token
            normalized=False,
            # To the tokenizers library, special tokens are those that `split_special_tokens` is about. In the original
            # it is about those of the vocabulary only.
            special=(special or token.special) and self._tokenizer.model.token_to_id(token.content) is not None,
        )

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
        how = (chat_template, add_generation_prompt, continue_final_message, tokenize)
        if not tokenize:
            return super().apply_chat_template(conversation, tools, documents, *how, sanitize_control_tokens, **kwargs)
        self._add_missing_chat_tokens(self.get_chat_template(chat_template, tools))
        names = self._names_that_are_text(every_one=sanitize_control_tokens)
        mark = _character_not_in([conversation, tools, documents, kwargs])
        conversation, tools, documents = (_marked(said, names, mark) for said in (conversation, tools, documents))
        kwargs["tokenizer_kwargs"] = {"split_special_tokens": False, **(kwargs.get("tokenizer_kwargs") or {})}
        return super(SkyworkTokenizer, self._blind_to(mark)).apply_chat_template(
            conversation, tools, documents, *how, **kwargs
        )

    def _blind_to(self, mark: str) -> SkyworkTokenizer:
        """A twin that removes the mark. Other threads may be using this one, so nothing changes here."""
        ours, theirs = self._tokenizer, Tokenizer(self._tokenizer.model)
        theirs.add_tokens([token for _, token in sorted(self.added_tokens_decoder.items())])
        # Normalizers come after the search for added tokens: with the mark in it, the name of a token is only text.
        remove = normalizers.Replace(mark, "")
        theirs.normalizer = remove if ours.normalizer is None else normalizers.Sequence([remove, ours.normalizer])
        theirs.pre_tokenizer, theirs.post_processor = ours.pre_tokenizer, ours.post_processor
        twin = copy.copy(self)
        twin._tokenizer = theirs
        return twin

    def _add_missing_chat_tokens(self, template: str) -> None:
        if all(token in self.added_tokens_encoder for token in CHAT_TOKENS if token in template):
            return
        self.add_chat_tokens()
        logger.warning(
            f"{', '.join(CHAT_TOKENS)} were added to the tokenizer, which has {len(self)} tokens now. A model with "
            "fewer rows, as base models have, gets its rows by `tokenizer.add_chat_tokens(model)`."
        )

    def _names_that_are_text(self, every_one: bool) -> list[str]:
        tokens = self.added_tokens_decoder.values()
        return [token.content for token in tokens if every_one or (token.special and self.split_special_tokens)]

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any) -> Any:
        # transformers' has the white space that a token swallowed in the token.
        encoded = self(text, pair, add_special_tokens=add_special_tokens, **kwargs)
        return self.convert_ids_to_tokens(encoded["input_ids"])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens)
        string, text = "", None
        for is_special, run in groupby(tokens, key=special.__contains__):
            names = list(run)
            if not is_special:
                text = _decoded(names)
                continue
            # The original puts the space before the text, not between the text and the special token.
            string += "".join(names if text is None else [" ", text, *names])
            text = None
        return string + (text or "")

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


def _strings(said: Any) -> Iterator[str]:
    said = getattr(said, "messages", said)
    if isinstance(said, str):
        yield said
    elif isinstance(said, (Mapping, list, tuple)):
        for item in said.values() if isinstance(said, Mapping) else said:
            yield from _strings(item)


def _character_not_in(said: Any) -> str:
    """One of those that Unicode keeps free for such uses, unless the text has all of them."""
    text = set("".join(_strings(said)))
    return next(character for character in map(chr, range(0xFDD0, 0x110000)) if character not in text)


def _marked(said: Any, names: list[str], mark: str) -> Any:
    """The same messages with marks in each of the names."""
    if isinstance(said, str):
        # The template removes `\r`, which must not hide a name until then.
        pattern = "|".join("\r*".join(map(re.escape, name)) for name in [*names, SEP])
        return re.sub(pattern, lambda found: _marked_name(found[0], names, mark), said)
    said = getattr(said, "messages", said)
    if isinstance(said, Mapping):
        return {key: _marked(value, names, mark) for key, value in said.items()}
    return [_marked(item, names, mark) for item in said] if isinstance(said, (list, tuple)) else said


def _marked_name(found: str, names: list[str], mark: str) -> str:
    if found.replace("\r", "") in names:
        return mark.join([*found, ""])
    # `special_encode` cuts the text here, before the tokenizer sees it and can swallow white space.
    return f"{mark}{found}{mark}"


def _decoded(pieces: list[str]) -> str:
    """The text of pieces as SentencePiece decodes it: without the space that begins it."""
    if pieces[0].startswith(SPACE):
        pieces = [pieces[0].removeprefix(SPACE), *pieces[1:]]
    text = ""
    for are_bytes, run in groupby(pieces, key=lambda piece: BYTE.fullmatch(piece) is not None):
        if are_bytes:
            text += _decoded_bytes(bytes(int(piece[3:5], 16) for piece in run))
        else:
            text += "".join(run).replace(SPACE, " ")
    return text


def _decoded_bytes(data: bytes) -> str:
    """UTF-8 with one replacement character for every byte, and not every sequence, that is none."""
    text = ""
    while True:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + "\ufffd"
            data = data[error.start + 1 :]


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """No pre-tokenizer: the Metaspace one, which Llama has, adds no space to a text that begins with one."""
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback="<0x00>" in vocab)
    )
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


def _read_sentencepiece(
    vocab_file: str | os.PathLike[str] | None = None,
    added_tokens_decoder: dict[int, AddedToken] | None = None,
    **_: Any,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]:
    """
    The vocabulary and the merges in a `tokenizer.model`, and the added tokens with those that the file defines.

    Two pieces merge if the result is a normal piece, the one with the highest score first. (transformers takes the
    order of the ids for that of the scores, and makes `<s>` from text where its parts happen to be pieces.)
    """
    if vocab_file is None:
        raise ValueError("SkyworkTokenizer needs a tokenizer.model, a tokenizer.json, or a vocabulary and merges.")
    pieces = _read_pieces(Path(vocab_file))
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
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
    try:
        model = [(number, dict(_fields(value))) for number, value in _fields(data) if number <= NORMALIZER_SPEC]
        pieces = [
            (piece[PIECE].decode(), *struct.unpack("<f", piece.get(SCORE, bytes(4))), piece.get(TYPE, NORMAL))
            for number, piece in model
            if number == PIECES
        ]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        pointer = data.startswith(b"version https://git-lfs")
        hint = "it is a pointer of Git LFS, so fetch the file itself" if pointer else "it is damaged or something else"
        raise ValueError(f"{path} is not a SentencePiece model: {hint}.") from error
    trainer, normalizer = (dict(model).get(spec, {}) for spec in (TRAINER_SPEC, NORMALIZER_SPEC))
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
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}[wire_type]
        if position + size > len(message):
            raise ValueError("The message ends early.")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        shift += 7
        position += 1
        if byte < 128:
            return value, position
