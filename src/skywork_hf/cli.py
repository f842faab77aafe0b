"""The `skywork-hf` command: arguments in, one call each."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

_PLAN_EXAMPLE = """\
example:
  skywork-hf plan Skywork/Skywork-MoE-Base-FP8 --gpu 4xrtx4090 --ram 128GiB --quantization gpu=fp8 cpu=int8 \\
      --will-it-help rtx3090 --figure plan.png
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits with status 1 and one sentence where the input was wrong."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"skywork-hf: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skywork-hf", description="Skywork models as ordinary transformers models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="load a bundled tiny Skywork-MoE, compare it with the reference, generate")
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser("inspect", help="say what a checkpoint is and whether it is whole; reads no weights")
    inspect.add_argument("path", metavar="PATH", help="a folder with config.json and weight files")
    inspect.set_defaults(run=_inspect)
    _add_plan(commands)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say which expert goes where, on these devices or on others; reads no weights",
        epilog=_PLAN_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.set_defaults(run=_plan)
    add = plan.add_argument
    add("model", metavar="MODEL", help="a folder with config.json, or a name on the Hub")
    add("--gpu", action="append", metavar="[Nx]CARD", help="N cards by name (8xrtx4090) or size (8x24GiB); repeatable")
    add("--ram", metavar="SIZE", help="what may be used of the CPU's memory, as 128GiB")
    add("--max-memory", nargs="+", metavar="DEVICE=SIZE", help="as accelerate has it: 0=22GiB cpu=96GiB")
    add("--quantization", nargs="+", metavar="NAME", help="fp8, int8, bnb-int8, nf4, bf16; or gpu=fp8 cpu=int8")
    add("--context", type=int, metavar="TOKENS", help="of a sequence; default: what the model was made for")
    add("--batch", type=int, default=1, metavar="N", help="sequences at a time; default: 1")
    add("--strategy", default="experts", help="experts (default), or layers")
    add("--usage", metavar="FILE", help="counts of collect_expert_usage")
    add("--bandwidth", nargs="+", metavar="DEVICE=GB/S", help="of a device's memory; the CPU's is measured here")
    add("--will-it-help", metavar="CARD", help="say what one more card would change")
    add("--figure", metavar="FILE", help="draw the plan: .png, .svg or .pdf")
    add("--save", metavar="FILE", help="write the plan as JSON")


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import run  # here, so that `--help` does not wait for torch

    run()


def _inspect(arguments: argparse.Namespace) -> None:
    from .checkpoints.inspection import inspect_checkpoint

    report = inspect_checkpoint(arguments.path)
    print(report)
    if not report.is_whole:
        sys.exit(1)


def _plan(arguments: argparse.Namespace) -> None:
    from .placement import measured_bandwidth, plan_device_map

    max_memory = _max_memory(arguments)
    bandwidth = {key: float(value) for key, value in _pairs("--bandwidth", arguments.bandwidth).items()}
    if "cpu" not in bandwidth and (max_memory is None or "cpu" in max_memory):
        bandwidth["cpu"] = measured_bandwidth() / 1e9
        print(f"Bandwidth of the CPU's memory: {bandwidth['cpu']:.0f} GB/s, measured here.\n")
    plan = plan_device_map(
        arguments.model,
        max_memory,
        _quantization(arguments.quantization),
        context_tokens=arguments.context,
        batch_size=arguments.batch,
        strategy=arguments.strategy,
        expert_usage=arguments.usage,
        bandwidth=bandwidth,
    )
    print(plan)
    if arguments.will_it_help:
        print(f"\n{plan.will_it_help(arguments.will_it_help)}")
    if arguments.save:
        plan.save(arguments.save)
    if arguments.figure:
        plan.draw(arguments.figure)


def _max_memory(arguments: argparse.Namespace) -> dict[Any, str] | None:
    """The budgets of `plan_device_map`; None where none was given, for the devices of this machine."""
    cards: list[str] = []
    for text in arguments.gpu or []:
        number, card = re.fullmatch(r"(?:(\d+)x)?(.+)", text).groups()  # type: ignore[union-attr]
        cards += [card] * int(number or 1)
    memory: dict[Any, str] = dict(enumerate(cards))
    if arguments.ram:
        memory["cpu"] = arguments.ram
    return memory | _pairs("--max-memory", arguments.max_memory) or None


def _quantization(names: list[str] | None) -> Any:
    if names is None or (len(names) == 1 and "=" not in names[0]):
        return names and names[0]
    return _pairs("--quantization", names)


def _pairs(option: str, texts: list[str] | None) -> dict[Any, str]:
    """`0=22GiB cpu=96GiB` as a dict; GPUs become numbers."""
    pairs: dict[Any, str] = {}
    for text in texts or []:
        key, separator, value = text.partition("=")
        if not (key and separator and value):
            raise ValueError(f"{option} {text}: expected DEVICE=VALUE, as in cpu=... or 0=...")
        pairs[int(key) if key.isdigit() else key] = value
    return pairs
