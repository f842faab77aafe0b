"""The base dependencies alone import every module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "import_every_module.py"
EXTRAS = ("bitsandbytes", "gguf", "hypothesis", "llama_cpp", "matplotlib", "peft", "pytest", "sentencepiece")


def test_no_module_needs_an_extra_to_import():
    blocked = f"import runpy, sys; sys.modules.update(dict.fromkeys({EXTRAS!r})); "
    program = f"{blocked}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "modules import." in run.stdout
