"""Fetch transformers' own common tests, of the installed version, and print the folder that holds them.

    python scripts/fetch_transformers_tests.py FOLDER

They are in transformers' source distribution, not in its wheel. Two modules that they import are in neither: they get
empty stand-ins. A folder that is already there is used as it is.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

STAND_INS = {
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def fetch(folder: Path) -> Path:
    name = f"transformers-{version('transformers')}"
    final = folder / name
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        requirement = name.replace("-", "==")
        subprocess.run([*pip, "--no-binary", ":all:", "--dest", scratch, requirement], check=True, stdout=sys.stderr)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(scratch, members=members, filter="data")
        tests = Path(scratch) / name / "tests"
        (tests / "__init__.py").touch()
        for path, text in STAND_INS.items():
            if not (tests / path).exists():
                (tests / path).parent.mkdir(exist_ok=True)
                (tests / path).write_text(text)
        tests.parent.rename(final)
    return final


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])).resolve())
