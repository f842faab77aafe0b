"""Runs transformers' own common tests on our classes.

They are not in transformers' wheel. The environment variable TRANSFORMERS_SDIST names an unpacked source distribution
of the installed version (`scripts/fetch_transformers_tests.py` fetches it); without it, what is here is skipped.
Modules that these tests import and that the distribution lacks come from `stand_ins/`; a checkout of transformers'
repository lacks none.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from .skips import SKIPS

HERE = Path(__file__).parent
SDIST = os.environ.get("TRANSFORMERS_SDIST")

THEIR_MARKERS = """
accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test is_expert_parallel_test is_fsdp_test
is_pipeline_test is_staging_test is_tensor_parallel_test is_training_test order slow torch_compile_test
"""

collect_ignore = ["stand_ins"]


def _offer(theirs: Path) -> None:
    """Make `tests.test_modeling_common` and its kin importable, here and in the processes that tests start.

    Python looks for them in a folder of links, to their files and to the stand-ins. Our own folder is a package
    `tests` too: here the two are merged, in other processes there is only theirs.
    """
    folder = Path(tempfile.mkdtemp(prefix="transformers-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "tests"
    package.mkdir()
    (package / "__init__.py").touch()
    stand_ins = list((HERE / "stand_ins").iterdir())
    for path in [*theirs.glob("*.py"), *(theirs / ours.name for ours in stand_ins), *stand_ins]:
        if path.exists() and not (package / path.name).exists():
            (package / path.name).symlink_to(path)
    sys.path.insert(0, str(folder))
    ours = sys.modules["tests"]
    ours.__path__ = [*ours.__path__, str(package)]


if SDIST:
    _offer(Path(SDIST).resolve() / "tests")


class _Skipped(pytest.Module):
    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(
            "TRANSFORMERS_SDIST does not name an unpacked source distribution of transformers: see `make test`",
            allow_module_level=True,
        )


def pytest_configure(config: pytest.Config) -> None:
    for marker in THEIR_MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: of transformers")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if SDIST else _Skipped.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE) or item.parent is None:
            continue
        for pattern, reason in SKIPS.get(f"{item.path.stem}.{item.parent.name}", {}).items():
            if fnmatchcase(item.name, pattern):
                item.add_marker(pytest.mark.skip(reason=reason))
