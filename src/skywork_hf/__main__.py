"""Run somebody else's program with the Skywork classes registered: `python -m skywork_hf SCRIPT.py [args]`, or
`python -m skywork_hf -m MODULE [args]` (`-m lm_eval`, `-m trl`, `-m transformers`, ...)."""

import os
import runpy
import sys

import skywork_hf  # noqa: F401  (importing registers)

USAGE = "usage: python -m skywork_hf SCRIPT.py [args ...]\n       python -m skywork_hf -m MODULE [args ...]"


def main() -> None:
    match sys.argv[1:]:
        case ["-m", module, *args]:
            sys.argv = [module, *args]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *args] if not script.startswith("-"):
            sys.argv = [script, *args]
            sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
            runpy.run_path(script, run_name="__main__")
        case ["-h" | "--help"]:
            print(USAGE)
        case _:
            sys.exit(USAGE)


if __name__ == "__main__":
    main()
