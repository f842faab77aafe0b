"""Every common test of transformers that is not run on a class of ours, and why: module and class of ours, to the
tests' names (`*` stands for anything), to the reason. `test_modeling.py` fails where a name is no test any more."""

from __future__ import annotations

SKIPS: dict[str, dict[str, str]] = {}
