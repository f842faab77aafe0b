"""What lies beside the weights of a checkpoint: config, generation config, tokenizer."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaConfig

from ..tokenization_skywork import SkyworkTokenizer
from ..untrusted import check_file, read_json
from .inspection import CONFIG_FILE, TOKENIZER_FILES
from .layouts import LLAMA, TRAINING, model_class_of
from .recipes import Source
from .writer import write_text

_GENERATION_CONFIG = "generation_config.json"
_CARRIED = (_GENERATION_CONFIG, "tokenizer.model", "LICENSE", "LICENSE.md")
_TOKENIZER_JSONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Beside:
    """Args:
    to: the layout of the result.
    config: what is to be written as `config.json`.
    carried: files that are copied as they are.
    tokenizer: the source's, if it has one.
    sources: the files that all but the config is made of.
    """

    to: str
    config: Any
    carried: tuple[Path, ...]
    tokenizer: SkyworkTokenizer | None
    sources: tuple[Path, ...]

    def write(self, folder: Path) -> None:
        """Write it all, with a `tokenizer.json`, which every program reads."""
        # All fields: the training layout's defaults are others.
        write_text(folder / CONFIG_FILE, self.config.to_json_string(use_diff=self.to != TRAINING))
        for file in self.carried:
            shutil.copyfile(file, folder / file.name)
        if self.tokenizer is None:
            return
        self.tokenizer.save_pretrained(folder)
        if self.to == LLAMA:  # for programs that know no Skywork
            file = folder / "tokenizer_config.json"
            content = json.loads(file.read_text(encoding="utf-8"))
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
            content["padding_side"] = self.tokenizer.padding_side  # a default of our class, and not of that one
            write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_beside(source: Source, to: str) -> Beside:
    """
    Raises:
        ValueError: a file is damaged; names it.
    """
    carried = _files_in(source.folder, _CARRIED)
    if source.folder / _GENERATION_CONFIG in carried:
        _check_generation_config(source.folder / _GENERATION_CONFIG)
    folder = source.tokenizer or source.folder
    sources = (*carried, *_files_in(folder, (*TOKENIZER_FILES, *_TOKENIZER_JSONS, "chat_template.jinja")))
    return Beside(to, _target_config(source, to), carried, _read_tokenizer(folder), tuple(dict.fromkeys(sources)))


def _files_in(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(check_file(folder / name) for name in names if (folder / name).exists())


def _target_config(source: Source, to: str) -> Any:
    config, architecture = deepcopy(source.config), model_class_of(source.config).__name__
    if to == LLAMA:
        known = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
        config = LlamaConfig(**{name: value for name, value in config.to_dict().items() if name in known})
        architecture = architecture.replace("Skywork", "Llama")
    config.architectures = [architecture]
    return config


def _check_generation_config(file: Path) -> None:
    content = read_json(file)
    try:
        GenerationConfig.from_dict(content)
    except Exception as error:  # as many kinds as there are wrong values
        raise _damaged(file, error) from error


def _read_tokenizer(folder: Path) -> SkyworkTokenizer | None:
    main = next(reversed(_files_in(folder, TOKENIZER_FILES)), None)
    if main is None:
        return None
    for file in _files_in(folder, _TOKENIZER_JSONS):
        read_json(file)
    try:
        tokenizer: SkyworkTokenizer = SkyworkTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises this very class
        raise _damaged(main, error) from error
    return tokenizer


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be read ({' '.join(str(error).split())}): download it again, or move it away.")
