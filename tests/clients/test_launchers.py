"""Launchers start each process of a program by `-m skywork_hf`, as the README says."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from transformers import AutoConfig
model_type = AutoConfig.for_model("skywork_moe").model_type
print("\\nfound", os.environ.get("RANK", "0"), model_type, sys.argv[1:], flush=True)
"""
LAUNCHERS = {
    "torchrun": (2, ["torch.distributed.run", "--nproc-per-node", "2"]),
    "accelerate": (1, ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_process_is_registered(launcher, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    processes, how = LAUNCHERS[launcher]
    command = [sys.executable, "-m", *how, "-m", "skywork_hf", tmp_path / "program.py", "--flag"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = sorted(line for line in run.stdout.splitlines() if line.startswith("found"))
    assert found == [f"found {rank} skywork_moe ['--flag']" for rank in range(processes)]
