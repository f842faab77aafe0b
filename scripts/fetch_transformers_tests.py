"""Fetch transformers' own common tests, of the installed version, and print the folder that holds them.

    python scripts/fetch_transformers_tests.py FOLDER

They are in transformers' source distribution, not in its wheel. A folder that is already there is used as it is.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def fetch(folder: Path) -> Path:
    name = f"transformers-{version('transformers')}"
    final = folder / name
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        requirement = name.replace("-", "==")
        subprocess.run([*pip, "--dest", scratch, requirement], check=True, stdout=sys.stderr)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(scratch, members=members, filter="data")
        (Path(scratch) / name).rename(final)
    return final


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])).resolve())
