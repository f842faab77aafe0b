"""`benchmarks/gpu.py`, which is for a GPU: that all of it runs, and what it says of what it cannot do."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from simulated_device import SimulatedDevices

pytest.importorskip("peft")

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    yield gpu
    for name in ("gpu", "gpu_bench", "random_models"):
        sys.modules.pop(name, None)


@pytest.fixture
def bench(gpu, tmp_path):
    arguments = {"device": "cpu", "tiny": True, "output": tmp_path / "gpu.json", "seconds": 100, "calibration": None}
    return gpu.Bench(Namespace(**arguments))


def test_all_sections_run_on_a_cpu(gpu, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--output", str(file)])
    found = json.loads(file.read_text())
    printed = capsys.readouterr().out.splitlines()
    assert found["seconds"].keys() == gpu.SECTIONS.keys()
    assert len([line for line in printed if line.startswith("|")]) == 2 + len(found["rows"])
    measured = {(row["section"], row["case"].split(",")[0]) for row in found["rows"] if row["ms"]}
    wanted = {("kernels", f"{part} {name}") for part in ("linear", "experts") for name in ("int8", "fp8", "bf16")}
    wanted |= {("layers", name) for name in ("int8", "fp8", "bf16")} | {("qlora", "int8")}
    assert measured >= wanted
    errors = {row["case"]: row["more"]["errors"] for row in found["rows"] if "errors" in row["more"]}
    assert len(errors) == 18
    assert all(0 < error < 0.03 for pair in errors.values() for error in pair)
    by_section = {row["section"]: row["note"] for row in found["rows"]}
    assert by_section["tests"] == by_section["whole"] == by_section["split"] == gpu.NEEDS_CUDA
    assert all(row["floor"] and row["expected"] for row in found["rows"] if "decode eager" in row["case"])


def test_experts_are_split_in_the_shares_that_were_asked_for(gpu, bench, monkeypatch):
    """Between a simulated GPU and the CPU."""
    monkeypatch.setattr(gpu, "SHARES", (0.5,))
    with SimulatedDevices() as simulated:
        bench.device, bench.gpu = torch.device("lazy:0"), "lazy:0"
        bench.run("split", gpu.split)
        assert any(copy.target == torch.device("cpu") for copy in simulated.copies)
    cases = [row.case for row in bench.rows if row.ms]
    assert [case.split(", ")[2] for case in cases] == [f"{count} experts on the GPU" for count in (16, 16)]


def test_what_fails_is_a_sentence_and_the_rest_goes_on(gpu, bench, capsys):
    def section(bench):
        bench.add("first", ms=1.0)
        with bench.case("second"):
            raise RuntimeError("\nCUDA error | of some kind\nand much more")
        bench.add("third", ms=2.0)
        bench.ends = 0
        with bench.case("fourth"):
            bench.add("fourth", ms=3.0)

    bench.run("card", section)
    bench.run("kernels", lambda _: 1 / 0)
    saved = json.loads(bench.output.read_text())["rows"]
    assert [row["case"] for row in saved] == ["first", "second", "third", "", ""]
    assert saved[1]["note"] == "failed: RuntimeError: CUDA error / of some kind"
    assert "the time is over" in saved[3]["note"]
    assert "division by zero" in saved[4]["note"]
    assert not list(bench.output.parent.glob("gpu.json?*"))


def test_what_pytest_says_is_told(gpu, bench, tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    gpu.tell_tests(bench, "some", gpu.pytest_lines([str(tmp_path)], 100))
    first, failed = bench.rows
    assert first.note.startswith("1 passed, 0 skipped, 1 failed, 0 error; ")
    assert "test_b" in failed.note
    assert gpu.pytest_lines([str(tmp_path)], 0) == ["ended after 0 seconds"]


def test_without_a_gpu_it_names_the_way_out(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu.main([])
