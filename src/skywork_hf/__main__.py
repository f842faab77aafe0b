"""Run somebody else's program with the Skywork classes registered, in it and in the processes that it starts:
`python -m skywork_hf SCRIPT.py [args]`, or `python -m skywork_hf -m MODULE [args]` (`-m lm_eval`, `-m trl`, ...)."""

import os
import runpy
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

from .registration import VARIABLE

USAGE = "usage: python -m skywork_hf SCRIPT.py [args ...]\n       python -m skywork_hf -m MODULE [args ...]"


def main() -> None:
    os.environ[VARIABLE] = "1"
    match sys.argv[1:]:
        case ["-m", module, *args]:
            sys.argv = [module, *args]
            sys.path.insert(0, os.getcwd())
            _run_module(module)
        case [script, *args] if not script.startswith("-"):
            sys.argv = [script, *args]
            sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
            runpy.run_path(script, run_name="__main__")
        case ["-h" | "--help"]:
            print(USAGE)
        case _:
            sys.exit(USAGE)


def _run_module(name: str) -> None:
    spec = find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    commands = entry_points(group="console_scripts", name=name)
    # Some packages, transformers and trl among them, are commands but cannot be run as modules.
    if is_package and commands and find_spec(f"{name}.__main__") is None:
        sys.exit(next(iter(commands)).load()())
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
