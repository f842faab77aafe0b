"""The `skywork-hf` command: arguments in, one call each."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .untrusted import printable, sentence

_PLAN_EXAMPLE = """\
example:
  skywork-hf plan Skywork/Skywork-MoE-Base-FP8 --gpu 4xrtx4090 --ram 128GiB --quantization gpu=fp8 cpu=int8 \\
      --will-it-help rtx3090 --figure plan.png
"""
_CALIBRATE = """\
example:
  skywork-hf calibrate --output machine.json
  skywork-hf plan Skywork/Skywork-MoE-Base-FP8 --calibration machine.json
"""
_CONVERT = """\
examples:
  skywork-hf convert Skywork-13B-Base skywork-13b-llama --to llama
  skywork-hf convert megatron/iter_0005000 skywork-moe --config config.json
  skywork-hf convert skywork-13b merged --adapter my-adapter
"""
_QUANTIZE = """\
example:
  skywork-hf quantize Skywork-MoE-Base skywork-moe-int8 --method int8
"""
_UPCYCLE = """\
example:
  skywork-hf upcycle Skywork-13B-Base skywork-moe-start --experts 16 --top-k 2
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits with status 1 and one sentence where the input was wrong."""
    try:
        arguments = vars(_parser().parse_args(argv))
        arguments.pop("run")(**arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough; nor is there anything to flush at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"skywork-hf: {sentence(error)}")
    except KeyboardInterrupt:
        sys.exit("skywork-hf: interrupted.")
    except Exception as error:
        sys.exit(f"skywork-hf: {_unexpected(error)}")


def _unexpected(error: Exception) -> str:
    """A sentence, where there should have been one of ours."""
    with tempfile.NamedTemporaryFile("w", prefix="skywork-hf-", suffix=".txt", delete=False, errors="replace") as file:
        file.write("".join(traceback.format_exception(error)))
    return (
        f"{type(error).__name__}: {sentence(error)} This was not foreseen: please report it, with {file.name}, where "
        "it comes from."
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _say(text: Any) -> None:
    """Print what may hold names from files."""
    print(printable(text))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="skywork-hf", description="Skywork models as ordinary transformers models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _command(commands, "demo", _demo, "load a bundled tiny Skywork-MoE, compare it with the reference, generate")
    inspect = _command(
        commands, "inspect", _inspect, "say what a checkpoint is and whether it is whole; reads no weights"
    )
    inspect.add_argument("path", metavar="PATH", help="a folder with config.json and weight files")
    _add_plan(commands)
    _add_calibrate(commands)
    _add_convert(commands)
    _add_quantize(commands)
    _add_upcycle(commands)
    verify = _command(commands, "verify", _verify, "compare two checkpoints across layouts and dtypes")
    verify.add_argument("first", metavar="A", help="a folder in any layout that convert reads")
    verify.add_argument("second", metavar="B", help="another")
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., None], help_: str, example: str = "", description: str | None = None
) -> argparse.ArgumentParser:
    """A command that calls `run` with its arguments, by their names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_, description=description, epilog=example, formatter_class=raw
    )
    parser.set_defaults(run=run)
    return parser


def _add_convert(commands: Any) -> None:
    what = "write a checkpoint in another layout, dtype or sharding"
    convert = _writing_command(commands, "convert", _convert, what, _CONVERT)
    convert.add_argument("--to", default="hub", help="hub (default), training, or llama (dense models)")
    convert.add_argument("--dtype", help="of all tensors: bfloat16, float16, float32")
    convert.add_argument("--quantization", help="int8, fp8 or fp8-weight-only")
    convert.add_argument("--adapter", metavar="FOLDER", help="a PEFT adapter to merge")


def _add_quantize(commands: Any) -> None:
    quantize = _writing_command(
        commands, "quantize", _quantize, "write a checkpoint with one byte a weight", _QUANTIZE
    )
    quantize.add_argument("--method", default="int8", help="int8 (default), fp8 or fp8-weight-only")


def _add_upcycle(commands: Any) -> None:
    upcycle = _writing_command(commands, "upcycle", _upcycle, "write a MoE checkpoint from a dense one", _UPCYCLE)
    upcycle.add_argument("--experts", type=int, default=16, help="in each MoE layer; default: 16")
    upcycle.add_argument("--top-k", type=int, default=2, help="experts chosen for each token; default: 2")
    upcycle.add_argument("--layers", default="every", metavar="every|N", help="every layer (default), or every Nth")
    upcycle.add_argument("--seed", type=int, default=0, help="of the gate and the noise; default: 0")
    upcycle.add_argument("--noise", type=float, default=0.0, help="on the experts, as a share of their deviation")
    add = upcycle.add_argument
    add("--no-logits-norm", dest="moe_use_logits_norm", action="store_false", help="a gate without normalised logits")


def _writing_command(*command: Any) -> argparse.ArgumentParser:
    """A command that reads a checkpoint and writes another; see `_command`."""
    parser = _command(*command)
    parser.add_argument("source", metavar="SRC", help="a folder: Hub layout, training layout or Megatron-LM")
    parser.add_argument("destination", metavar="DST", help="the folder to write; it must not be there yet")
    parser.add_argument("--config", metavar="FILE", help="config.json for a Megatron checkpoint that lacks one")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file; default: 5GB")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run has left")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="read all again (default)"
    )
    return parser


def _add_plan(commands: Any) -> None:
    plan = _command(
        commands,
        "plan",
        _plan,
        "say which expert goes where, on these devices or on others; reads no weights",
        _PLAN_EXAMPLE,
        "Say which expert goes where. Without --gpu, --ram and --max-memory: on this machine's devices.",
    )
    add = plan.add_argument
    add("model", metavar="MODEL", help="a folder with config.json, or a name on the Hub")
    gpu_help = "N GPUs by size (8x24GiB) or name (8xrtx4090; an unknown name lists those that are known); repeatable"
    add("--gpu", action="append", default=[], metavar="[Nx]CARD", help=gpu_help)
    add("--ram", metavar="SIZE", help="what may be used of the CPU's memory, as 128GiB; none beside --gpu by default")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("--max-memory", **several, metavar="DEVICE=SIZE", help="as accelerate has it: 0=22GiB cpu=96GiB")
    add("--quantization", **several, metavar="NAME", help="fp8, int8, bnb-int8, nf4, bf16; or gpu=fp8 cpu=int8")
    context_help = "of a sequence; default: what the model was made for"
    add("--context", dest="context_tokens", type=int, metavar="TOKENS", help=context_help)
    add("--batch", dest="batch_size", type=int, default=1, metavar="N", help="sequences at a time; default: 1")
    add("--strategy", default="experts", help="experts (default), or layers")
    add("--usage", dest="expert_usage", metavar="FILE", help="counts of collect_expert_usage")
    add("--kv-cache-dtype", metavar="NAME", help="fp8, int8, int4 or int2; default: the model's dtype")
    bandwidth_help = "of a device's memory, as cpu=60; cards bring theirs; this machine's CPU is measured"
    add("--bandwidth", **several, metavar="DEVICE=GB/S", help=bandwidth_help)
    calibration_help = "what `skywork-hf calibrate` wrote, on this machine or on the one that is planned for"
    add("--calibration", metavar="FILE", help=calibration_help)
    add("--will-it-help", metavar="CARD", help="say what one more card would change")
    add("--figure", metavar="FILE", help="draw the plan: .png, .svg or .pdf")
    add("--save", metavar="FILE", help="write the plan as JSON")


def _add_calibrate(commands: Any) -> None:
    what = "measure this machine in about a minute, for `plan --calibration`"
    calibrate = _command(commands, "calibrate", _calibrate, what, _CALIBRATE)
    output_help = "default: skywork-calibration.json; replaced if it is there"
    calibrate.add_argument("--output", default="skywork-calibration.json", metavar="FILE", help=output_help)
    folder_help = "on the disk that weights are on: a temporary file of 192 MB is written and read; default: here"
    calibrate.add_argument("--folder", default=".", metavar="FOLDER", help=folder_help)


def _demo() -> None:
    from .demo import run  # here, so that `--help` does not wait for torch

    run()


def _inspect(path: str) -> None:
    from .checkpoints.inspection import inspect_checkpoint

    report = inspect_checkpoint(path)
    _say(report)
    if not report.is_whole:
        sys.exit(1)


def _plan(
    model: str,
    gpu: list[str],
    ram: str | None,
    max_memory: list[str],
    quantization: list[str],
    bandwidth: list[str],
    will_it_help: str | None,
    figure: str | None,
    save: str | None,
    **options: Any,
) -> None:
    from .placement import measured_bandwidth, plan_device_map

    speeds = _bandwidth(bandwidth)
    budgets = _max_memory(gpu, ram, max_memory)
    plan = plan_device_map(model, budgets, _quantization(quantization), bandwidth=speeds, **options)
    is_known = "cpu" in speeds or options["calibration"]
    if budgets is None and not is_known and plan.bytes_read_per_token.get("cpu"):
        speeds["cpu"] = measured_bandwidth() / 1e9
        print(f"cpu: {speeds['cpu']:.0f} GB/s, measured here\n")
        plan = plan_device_map(model, budgets, _quantization(quantization), bandwidth=speeds, **options)
    _say(plan)
    if will_it_help:
        _say(f"\n{plan.will_it_help(will_it_help)}")
    if save:
        plan.save(save)
    if figure:
        plan.draw(figure)


def _calibrate(output: str, folder: str) -> None:
    from .placement.measure import measured_calibration

    measured_calibration(folder, _say).save(output)
    _say(f"Wrote {output}.")


def _max_memory(gpu: list[str], ram: str | None, max_memory: list[str]) -> dict[Any, str] | None:
    """The budgets of `plan_device_map`; None where none was given, for the devices of this machine."""
    memory: dict[Any, str] = dict(enumerate(card for text in gpu for card in _cards(text)))
    if ram:
        memory["cpu"] = ram
    others = _pairs("--max-memory", max_memory)
    if twice := memory.keys() & others.keys():
        raise ValueError(f"--max-memory names {sorted(map(str, twice))}, which --gpu or --ram give: say it once.")
    return memory | others or None


def _cards(text: str) -> list[str]:
    """`8xrtx4090` as eight names of a card, `24GiB` as one size."""
    found = re.fullmatch(r"(?:([1-9][0-9]{0,2})x)?([a-z].*|[\d.]+ ?[kmg]i?b)", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"--gpu {text}: expected a card or a size, and how many, as in 8xrtx4090 or 24GiB.")
    number, card = found.groups()
    return [card] * int(number or 1)


def _quantization(names: list[str]) -> Any:
    """None, the one name for all devices, or names by device."""
    if len(names) == 1 and "=" not in names[0]:
        return names[0]
    return _pairs("--quantization", names) or None


def _bandwidth(texts: list[str]) -> dict[Any, float]:
    """GB/s by device."""
    bandwidth = {}
    for key, text in _pairs("--bandwidth", texts).items():
        try:
            bandwidth[key] = float(text)
        except ValueError:
            raise ValueError(f"--bandwidth {key}={text}: expected GB/s, as in cpu=60.") from None
    return bandwidth


def _pairs(option: str, texts: list[str]) -> dict[Any, str]:
    """`0=22GiB cpu=96GiB` as a dict; GPUs become numbers."""
    pairs: dict[Any, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not (key and separator and value):
            raise ValueError(f"{option} {text}: expected DEVICE=VALUE, as in cpu=... or 0=...")
        key = key.removeprefix("cuda:")
        pairs[int(key) if key.isdigit() else key] = value
    return pairs


def _convert(**options: Any) -> None:
    from .checkpoints.convert import convert_checkpoint

    _say(f"Wrote {convert_checkpoint(**options)}.")


def _quantize(**options: Any) -> None:
    from .checkpoints.convert import quantize_checkpoint

    _say(f"Wrote {quantize_checkpoint(**options)}.")


def _upcycle(layers: str, **options: Any) -> None:
    from .checkpoints.convert import upcycle_checkpoint

    if layers != "every" and not layers.isdecimal():
        raise ValueError(f"--layers {layers}: expected every, or a number N for every Nth layer.")
    _say(f"Wrote {upcycle_checkpoint(interval=1 if layers == 'every' else int(layers), **options)}.")


def _verify(first: str, second: str) -> None:
    from .checkpoints.comparison import compare_checkpoints

    comparison = compare_checkpoints(first, second)
    _say(comparison)
    if not comparison.is_equal:
        sys.exit(1)
