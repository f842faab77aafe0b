"""What came from anywhere: files that are opened only if they are files, JSON within bounds, text for a terminal."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# An index of half a million tensors has as many bytes; no JSON of a checkpoint is nested more than ten deep.
_MOST_BYTES, _DEEPEST = 2**26, 64
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LONGEST_SENTENCE = 2000


def check_file(file: Path) -> Path:
    """`file`, which opening and reading ends with.

    Raises:
        ValueError: it is not there, or a folder, a pipe, a device or a socket.
    """
    try:
        kind = stat.S_IFMT(file.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file} is not there: copy or download it from where the weights came from.") from None
    if kind != stat.S_IFREG:
        raise ValueError(f"{file} is {_KINDS.get(kind, 'something else')}: expected a file.")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is not there, no file, too large, not JSON, or holds no object.
    """
    if (size := check_file(file).stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{file} has {size:,} bytes: expected JSON of at most {_MOST_BYTES:,}.")
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): download or write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object: download or write it again.")
    return content


def parse_json(data: bytes) -> Any:
    """What JSON, as its standard has it, says.

    Raises:
        ValueError: it is none, nested deeply, or holds a number that is infinite or none, or half a surrogate pair.
    """
    try:
        content = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [content], 0
    while level := [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        json.dumps(content, ensure_ascii=False).encode()  # says where half a pair is
    return content


def _inside(content: Any) -> Any:
    return content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return number


@contextmanager
def naming(what: Any) -> Iterator[None]:
    """Name the file in whatever is raised while a model is built as it says: there are as many kinds as there are
    values that no model is made of."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{what} describes no model that can be built: {sentence(error)}") from error


def printable(text: Any) -> str:
    """`str` of it, with what a terminal would obey, or no encoding has, spelled out. Line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def sentence(error: Any) -> str:
    """An error on one printable line, which is not endless."""
    text = re.sub(r"\s*\n\s*", " ", printable(error).strip())
    half = _LONGEST_SENTENCE // 2
    return text if len(text) <= _LONGEST_SENTENCE else f"{text[:half]} ... {text[-half:]}"
