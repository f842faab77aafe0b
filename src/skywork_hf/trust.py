"""Where transformers, with `trust_remote_code=True`, would run code that comes with a Skywork checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE, REPO_ID_SEPARATOR
from transformers import PreTrainedConfig

from .untrusted import check_file

MODEL_TYPES = ("skywork", "skywork_moe")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def refuse_tokenizer_code(name: str | os.PathLike[str] | None, error: type[Exception] = ValueError) -> None:
    """Refuse a checkpoint whose tokenizer AutoTokenizer would make of the checkpoint's own code.

    Args:
        name: a folder, in all of which is looked, or a name on the Hub; none of a config that was never read.
        error: what is raised.
    """
    for where, content in _tokenizer_configs(str(name)) if name else ():
        auto_map = content.get("auto_map")
        code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        if code and not _is_installed(content.get("tokenizer_class")):
            raise error(
                f"{where} names code of the checkpoint, {code!r}, for a tokenizer, and the class "
                f"{content.get('tokenizer_class')!r}, where 'SkyworkTokenizer' was expected: AutoTokenizer would run "
                "that code. Load it with skywork_hf.SkyworkTokenizer.from_pretrained, or write that class there."
            )


def _tokenizer_configs(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a checkpoint has a tokenizer config, and what it holds."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if os.path.isdir(name):
        for file in sorted(Path(name).rglob(_TOKENIZER_CONFIG)):
            try:
                # As transformers reads it: what it takes and `read_json` does not must not be passed over.
                content = json.loads(check_file(file).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue  # transformers cannot read it either
            if isinstance(content, dict):
                yield str(file), content
        return
    # Which revision is asked for, a config is not told; but it was read before, and so is in the cache.
    snapshots = Path(HF_HUB_CACHE) / f"models{REPO_ID_SEPARATOR}{name.replace('/', REPO_ID_SEPARATOR)}" / "snapshots"
    for revision in (None, *(folder.name for folder in snapshots.glob("*"))):
        try:
            content = get_tokenizer_config(name, revision=revision)
        except (OSError, ValueError):
            continue
        yield f"{_TOKENIZER_CONFIG} of {name}", content


def _is_installed(tokenizer_class: Any) -> bool:
    """Whether AutoTokenizer takes a class of that name which a package registered, whatever a checkpoint brings."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = tokenizer_class_from_name(tokenizer_class.removesuffix("Fast")) if tokenizer_class else None
    return found is not None and not found.__module__.startswith("transformers.")


def is_ours(name: str | os.PathLike[str], **options: Any) -> bool:
    """Whether a folder or repository has a config of a Skywork model; `options` of the Hub say where to look."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **{k: v for k, v in options.items() if k in _HUB_OPTIONS})
    except OSError:
        return False
    return config.get("model_type") in MODEL_TYPES
