"""The `skywork-hf` command: arguments in, one call each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits with status 1 and one sentence where the input was wrong."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"skywork-hf: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skywork-hf", description="Skywork models as ordinary transformers models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="load a bundled tiny Skywork-MoE, compare it with the reference, generate")
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser("inspect", help="say what a checkpoint is and whether it is whole; reads no weights")
    inspect.add_argument("path", metavar="PATH", help="a folder with config.json and weight files")
    inspect.set_defaults(run=_inspect)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import run  # here, so that `--help` does not wait for torch

    run()


def _inspect(arguments: argparse.Namespace) -> None:
    from .checkpoints.inspection import inspect_checkpoint

    report = inspect_checkpoint(arguments.path)
    print(report)
    if not report.is_whole:
        sys.exit(1)
