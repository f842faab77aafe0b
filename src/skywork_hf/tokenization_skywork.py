"""The Skywork tokenizer on the `tokenizers` backend.

It gives the ids and the text of the original slow class of 2023 (a SentencePiece BPE with Llama's legacy behaviour):

* a dummy space before the text, also where the text starts with a space, and before the text after a chat token;
* spaces are kept as they are, and decoding takes the dummy space away again;
* `<s>`, `</s>` and `<unk>` in a text are text, not control tokens (`split_special_tokens`), while chat tokens are
  recognised wherever they stand, and swallow the spaces around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import SentencePieceExtractor

CHAT_TOKENS = ("[USER]", "[BOT]", "[SEP]")

# `special_encode` of the released chat code for one question, and its natural extension: an answer ends with eos,
# every question starts anew with bos, a system message stands before the first question, on a line of its own.
CHAT_TEMPLATE = """\
{%- set turns = namespace(system='', expected='user') -%}
{{- eos_token -}}
{%- for message in messages -%}
    {%- set content = (message['content'] | replace('\\r', '')).strip() -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set turns.system = content + '\\n' -%}
    {%- elif message['role'] not in ('user', 'assistant') -%}
        {{- raise_exception('Message ' ~ loop.index0 ~ ' has the role "' ~ message['role'] ~ '": expected "user" or '
            ~ '"assistant", or "system" in the first message.') -}}
    {%- elif message['role'] != turns.expected -%}
        {{- raise_exception('Message ' ~ loop.index0 ~ ' has the role "' ~ message['role'] ~ '" where "'
            ~ turns.expected ~ '" was expected: user and assistant take turns, and the user begins.') -}}
    {%- elif message['role'] == 'user' -%}
        {{- bos_token ~ '[USER]' ~ turns.system ~ content ~ '[SEP]' -}}
        {%- set turns.system = '' -%}
        {%- set turns.expected = 'assistant' -%}
    {%- else -%}
        {{- '[BOT]' -}}
        {%- generation -%}{{- content ~ eos_token -}}{%- endgeneration -%}
        {%- set turns.expected = 'user' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[BOT]' -}}{%- endif -%}
"""

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class SkyworkTokenizer(TokenizersBackend):
    """Tokenizer of all Skywork models, from `tokenizer.model` (the released file) or `tokenizer.json`.

    Pads on the left, adds bos. `split_special_tokens=False` in a call makes `<s>` and `</s>` in the text control
    tokens.

    Raises:
        ValueError: the file is not a SentencePiece model.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    model = BPE  # type: ignore[assignment]
    _tokenizer: Any

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        merges: list[tuple[str, str]] | None = None,
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<unk>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = True,
        chat_template: str | dict[str, str] | None = CHAT_TEMPLATE,
        **kwargs: Any,
    ) -> None:
        vocab = vocab or {str(unk_token): 0, str(bos_token): 1, str(eos_token): 2}
        self._tokenizer = Tokenizer(
            BPE(vocab=vocab, merges=merges or [], unk_token=str(unk_token), fuse_unk=True, byte_fallback=True)
        )
        # Not the Metaspace pre-tokenizer, which adds no dummy space to a text that starts with a space.
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        self._tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        # Of the 2023 class; saying them again would say nothing.
        for leftover in ("legacy", "sp_model_kwargs", "auto_map", "add_prefix_space", "use_default_system_prompt"):
            kwargs.pop(leftover, None)
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            split_special_tokens=split_special_tokens,
            chat_template=chat_template,
            **kwargs,
        )
        self._add_text_tokens(token for token in CHAT_TOKENS if token in vocab)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        path = kwargs.get("vocab_file")
        if path is not None and kwargs.get("tokenizer_file") is None:
            try:
                SentencePieceExtractor(path)
            except ImportError:
                raise
            except Exception as error:
                raise ValueError(f"{path} is not a SentencePiece model ({error}): download it again.") from error
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)

    @classmethod
    def convert_from_spm_model(cls, **kwargs: Any) -> dict[str, Any]:
        """What transformers read from `tokenizer.model`, put right: a merge may not build a control or byte piece,
        which SentencePiece never finds in a text; user-defined pieces stay tokens of the text, not special ones."""
        pieces = kwargs.pop("additional_special_tokens", [])
        hidden = {str(piece) for piece in pieces if piece.special} | {"<unk>"}
        kwargs["merges"] = [
            (left, right)
            for left, right in kwargs["merges"]
            if left + right not in hidden and not _BYTE_PIECE.fullmatch(left + right)
        ]
        return kwargs

    def add_chat_tokens(self, model: Any = None) -> int:
        """Add those of `[USER]`, `[BOT]` and `[SEP]` that are missing, as in the released chat models.

        Args:
            model: a PreTrainedModel; its embedding and head get rows for the chat tokens, where they have fewer rows
                than the tokenizer has tokens.

        Returns:
            How many were added.
        """
        added = self._add_text_tokens(CHAT_TOKENS)
        if model is not None and model.get_input_embeddings().weight.shape[0] < len(self):
            model.resize_token_embeddings(len(self))
        return added

    def _add_text_tokens(self, tokens: Iterable[str]) -> int:
        return self.add_tokens(
            [AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=False) for token in tokens]
        )

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As transformers documents it; `add_generation_prompt=True` gives the ids of the original `special_encode`.

        Control tokens that a message spells out (`</s>`, `[USER]`) stay text: `sanitize_control_tokens` is true
        unless asked otherwise, or with `return_assistant_tokens_mask`, where transformers cannot do it.

        Raises:
            ValueError: the tokenizer has no chat tokens; `add_chat_tokens` adds them.
        """
        missing = [token for token in CHAT_TOKENS if token not in self.get_vocab()]
        if missing and chat_template is None and tokenize:
            raise ValueError(
                f"This tokenizer of a base model has no {', '.join(missing)}, which its chat template needs. Call "
                "`tokenizer.add_chat_tokens(model)`, which gives the model's embedding rows for them too; rows that "
                "are new must be trained."
            )
        if kwargs.get("sanitize_control_tokens") is None:
            kwargs["sanitize_control_tokens"] = tokenize and not kwargs.get("return_assistant_tokens_mask")
        # The template writes `</s><s>`, and there they are control tokens.
        split_special_tokens, self.split_special_tokens = self.split_special_tokens, False
        try:
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                **kwargs,
            )
        finally:
            self.split_special_tokens = split_special_tokens

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        """As the original slow class: chat tokens stand between spaces, and each run of other tokens is decoded for
        itself, so loses its own dummy space."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        special = set(self.all_special_ids)
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in special]
        chat = set(self.added_tokens_decoder) - special
        texts: list[str] = []
        for is_chat, run in groupby(ids, key=chat.__contains__):
            if is_chat:
                texts.extend(self.convert_ids_to_tokens(list(run)))
            else:
                texts.append(self._decode_run(list(run), special))
        return (" " if spaces_between_special_tokens else "").join(texts)

    def _decode_run(self, ids: list[int], special: set[int]) -> str:
        text, done = "", 0
        for is_special, run in groupby(ids, key=special.__contains__):
            part = list(run)
            done += len(part)
            if is_special:
                text += "".join(self.convert_ids_to_tokens(part))
            else:  # the original puts a space before text that a special token follows
                text += " " * (done < len(ids)) + self._tokenizer.decode(part)
        return text


__all__ = ["SkyworkTokenizer"]
