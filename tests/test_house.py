"""The arrows between the modules: what the package's own source imports, read and not run."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import skywork_hf

SOURCE = Path(skywork_hf.__file__).parent

# A module imports modules of its own line and of lines below it. A package's name stands for all of its modules that
# no line names.
LAYERS = """
__init__ __main__
registration
cli
demo
evaluation
serving
checkpoints
training
placement
placement.dispatch
placement.experts
placement.pages
placement.report
placement.machine placement.plan
placement.advice
placement.saving placement.text placement.picture
placement.attempt
placement.problem
placement.speed
placement.calibration
placement.rates
placement.spread
placement.sizes
placement.precision
placement.usage
placement.heatmap
placement.devices
quantization
modeling_skywork modeling_skywork_moe
loading losses overflow adapters
configuration_skywork tokenization_skywork
trust compat
readers
headers
untrusted
"""
HEIGHTS = {name: -number for number, line in enumerate(LAYERS.splitlines()) for name in line.split()}

# Where imports inside of functions are more than an optional dependency.
LATE = {
    "__init__": "names are loaded when they are asked for, so that importing the package costs nothing",
    "registration": "our classes are imported when the library is there that they are registered with",
    "quantization.matmul": "the CPU kernels are written with numba, which is optional",
    "quantization.gpu_kernels": "the kernels are written in Triton, which is optional",
    "cli": "`--help` and wrong arguments do not wait for torch",
}


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


MODULES = {name_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


def imported(node: ast.AST, file: Path) -> list[str]:
    """The modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        wholes = [alias.name for alias in node.names if alias.name.partition(".")[0] == "skywork_hf"]
        return [whole.partition(".")[2] or "__init__" for whole in wholes]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        where = [*file.relative_to(SOURCE).parent.parts]
        where = where[: len(where) - node.level + 1]
    elif (node.module or "").partition(".")[0] == "skywork_hf":
        where = []
    else:
        return []
    named = (node.module or "").split(".") if node.module else []
    base = [*where, *(named if node.level else named[1:])]
    found = [".".join([*base, alias.name]) for alias in node.names]
    return [name if name in MODULES else ".".join(base) or "__init__" for name in found]


def imports_of(file: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(file.read_text())) for name in imported(node, file)}


def height(module: str) -> int:
    while module not in HEIGHTS:
        assert "." in module, f"{module}.py stands in no layer: give it a line in {__file__}."
        module = module.rpartition(".")[0]
    return HEIGHTS[module]


IMPORTS = {name: imports_of(file) for name, file in MODULES.items()}


def test_imports_are_read():
    """Each way to write one, and no module that is not there."""
    text = "from . import plan\nfrom .text import bound\nfrom ..headers import a\nfrom .. import trust, x\n"
    text += "import skywork_hf.losses\nfrom skywork_hf.cli import b\nimport skywork_hf, torch\nfrom torch import nn\n"
    names = [name for node in ast.parse(text).body for name in imported(node, SOURCE / "placement" / "usage.py")]
    above = ["placement.plan", "placement.text", "headers", "trust", "__init__", "losses", "cli", "__init__"]
    assert names == above
    assert set().union(*IMPORTS.values()) <= MODULES.keys()


def test_no_module_imports_itself_over_others():
    list(TopologicalSorter(IMPORTS).static_order())  # a CycleError names the circle


def test_arrows_point_down():
    upward = [f"{one} -> {other}" for one in IMPORTS for other in IMPORTS[one] if height(other) > height(one)]
    assert not upward


def test_only_the_package_itself_imports_registration():
    assert {name for name in IMPORTS if "registration" in IMPORTS[name]} <= {"__init__", "__main__"}


def test_modules_are_imported_at_the_top():
    for module, file in MODULES.items():
        if module in LATE:
            continue
        tree = ast.parse(file.read_text())
        late = [node for node in ast.walk(tree) if imported(node, file) and node not in tree.body]
        assert not late, f"{module}, line {late[0].lineno}"
