"""All there is to know of one GPU, in at most 8 minutes: do the kernels compute what they should, and how fast.

    python benchmarks/gpu.py [--sections card tests ...] [--seconds 480] [--output gpu.json] [--calibration FILE]
    python benchmarks/gpu.py --device cpu --tiny     # that the script works, anywhere, in a quarter of a minute

Nothing is downloaded, and no checkpoint is written: weights are random and made on the card. The sections, in order:

* card: how fast it reads, and multiplies in each format: what the floors below are reckoned with.
* tests: those that are marked `gpu`, and the Triton kernels' on the card; each a fifth of the time that is left.
* kernels: a linear and a layer's experts of the real shape (hidden 4608, ffn 12288, 16 experts, top 2) by format and
  rows, as a loaded model runs them, beside the reference path. The floor is reading the weights once, or multiplying
  by them; errors are relative to float32.
* calibration: `skywork-hf calibrate`, unless its file is given by --calibration; else "expected" is what tables say.
* layers: 8 layers (fewer where they do not fit), a vocabulary of 4,096: decoding with a static cache, eager and
  compiled whole, and a prompt of 2,048 tokens; what the cost model of plans expects beside it.
* whole: all 52 layers in FP8, where they fit (139 GiB).
* split: 4 layers in int8 with 100, 75, 50, 25 and 0 % of the experts on the GPU and the rest on the CPU.
* qlora: a step of training adapters of all linears over 4 layers in int8, 2,048 tokens; memory beside the expected.

Launches, kernels, waits of the host and copies between it and the GPU are counted by torch's profiler, a layer in
models, all of them else. Kernels' times are the GPU's own; models' are the fastest of some runs by the clock.

What fails is a sentence in the table, and the rest goes on; the JSON is written anew after each line, so that whenever
this ends, what was measured is there.

To reach: decoding compiled at least 0.75 of the floor in int8 and FP8, eager 0.6 on cards of up to 1 TB/s; the prompt
0.5.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from gpu_bench import Bench, Profile, Row  # beside this file, as is
from random_models import FORMATS, random_model
from transformers import StaticCache

from skywork_hf import SkyworkMoeConfig
from skywork_hf.compat import CACHE
from skywork_hf.modeling_skywork_moe import SkyworkMoeExperts
from skywork_hf.placement.devices import GIB, devices_of, measured_bandwidth
from skywork_hf.placement.measure import measured_calibration
from skywork_hf.placement.plan import PlacementPlan, plan_device_map
from skywork_hf.placement.report import placement_report
from skywork_hf.quantization.linear import SkyworkQuantizedLinear
from skywork_hf.quantization.matmul import dequantized_linear

ROOT = Path(__file__).parent.parent
ROWS = (1, 2, 4, 8, 16, 17, 64, 512)
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
LAYERS, FEW_LAYERS, ALL_LAYERS = 8, 4, 52
REAL = {"vocab_size": 4096}  # all else is the config's default
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
# Of a cache that holds a short prompt and all that is decoded; of a run that is timed as one.
CACHE_TOKENS, SHORT, TOKENS_A_RUN = 256, 8, 16
# Bytes that models leave for a prompt and for training, and the largest, which leaves no more than it must.
SPARE, SPARE_OF_TRAINING, SPARE_OF_WHOLE = 4 * GIB, 12 * GIB, 3 * GIB // 2
NEEDS_CUDA = "needs CUDA, and was not run."


def card(bench: Bench) -> None:
    free, total = torch.cuda.mem_get_info() if bench.is_cuda else (0, 0)
    bench.add(
        "reads",
        note=f"{bench.bandwidth() / 1e9:,.0f} GB/s; {bench.card}, {free / GIB:.1f} of {total / GIB:.1f} GiB",
    )
    for name in ("bf16", "int8", "fp8"):
        with bench.case(f"multiplies in {name}"):
            bench.add(f"multiplies in {name}", note=f"{bench.flops(name) / 1e12:,.3g} TFLOP/s")


def tests(bench: Bench) -> None:
    if not bench.is_cuda:
        bench.add("", note=NEEDS_CUDA)
        return
    marked = [str(file) for file in sorted(ROOT.glob("tests/test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    groups = {"marked gpu": ["-m", "gpu", *marked], "Triton kernels": ["tests/test_triton_kernels.py"]}
    for case, chosen in groups.items():
        with bench.case(case):
            tell_tests(bench, case, pytest_lines(chosen, bench.left() / 5))


def tell_tests(bench: Bench, case: str, lines: list[str]) -> None:
    """A row of how many passed, and one of each that did not."""
    found = {word: [line for line in lines if f" {word}" in line] for word in ("PASSED", "SKIPPED", "FAILED", "ERROR")}
    found["ERROR"] += [line for line in lines if line.startswith("ERROR ")]  # of a file that could not be read
    counts = ", ".join(f"{len(of)} {word.lower()}" for word, of in found.items())
    bench.add(case, note=f"{counts}; {lines[-1].strip('= ')}", more={"lines": lines})
    for line in (*found["FAILED"], *found["ERROR"]):
        bench.add(case, note=line.replace("|", "/"))


def pytest_lines(chosen: list[str], seconds: float) -> list[str]:
    """What pytest says of each test, until it ends or the seconds are over."""
    options = ["-v", "--tb=line", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--no-header", *chosen]
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as file:
        command = [sys.executable, "-m", "pytest", *options]
        run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, stdout=file, stderr=file)
        try:
            run.wait(seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            file.seek(0, os.SEEK_END)
            file.write(f"\nended after {seconds:.0f} seconds\n")
        file.seek(0)
        return [line.strip() for line in file if line.strip()]


@torch.no_grad()
def kernels(bench: Bench) -> None:
    for name in ("int8", "fp8", "bf16"):
        with bench.case(name):
            compare_kernels(bench, name)


def compare_kernels(bench: Bench, name: str) -> None:
    model = random_model(config_of(bench, 1), name, bench.device)
    kernels = {kernel for found in placement_report(model).experts.values() for _, kernel in found}
    bench.add(name, note=f"one token runs {' and '.join(sorted(kernels))}.")
    experts = model.model.layers[0].block_sparse_moe.experts
    for rows in (1, 16, 17) if bench.is_tiny else ROWS:
        compare_linears(bench, name, [expert.w1 for expert in experts], rows)
        compare_experts(bench, name, experts, rows)


def reference(linear: Any, rows: torch.Tensor) -> torch.Tensor:
    if isinstance(linear, SkyworkQuantizedLinear):
        return dequantized_linear(rows, linear.codes, linear.weight_scale)
    return F.linear(rows, linear.weight.to(rows.dtype))


def expert_reference(expert: Any, rows: torch.Tensor) -> torch.Tensor:
    return reference(expert.w2, F.silu(reference(expert.w1, rows)) * reference(expert.w3, rows))


def compare_linears(bench: Bench, name: str, linears: list[Any], rows: int) -> None:
    """Of linears that take turns, so that none is found in the card's cache."""
    first = linears[0]
    inputs = torch.randn(rows, first.in_features, device=bench.device).bfloat16()
    turn = cycle(linears)
    weights = first.in_features * first.out_features
    floor = max(weights * FORMATS[name] / bench.bandwidth(), 2 * rows * weights / bench.flops(name))
    compare(
        bench,
        f"linear {name}, {rows} rows",
        floor * 1e3,
        lambda: next(turn)(inputs),
        lambda: reference(next(turn), inputs),
        (first(inputs), reference(first, inputs), reference(first, inputs.float())),
    )


def compare_experts(bench: Bench, name: str, experts: SkyworkMoeExperts, rows: int) -> None:
    """Of rows that choose two experts each, others one after the other until all are chosen."""
    w1, chosen = experts[0].w1, min(2 * rows, len(experts))
    inputs = torch.randn(rows, w1.in_features, device=bench.device).bfloat16()
    numbers = torch.arange(2 * rows, device=bench.device).view(rows, 2)
    turns = [(numbers + first) % len(experts) for first in range(0, len(experts), 2)]
    shares = torch.full((rows, 2), 0.5, device=bench.device)

    def by_reference(states: torch.Tensor) -> torch.Tensor:
        outputs = torch.zeros_like(states)
        for number in range(chosen):
            places = slice(number // 2, None, len(experts) // 2)  # of the rows that chose it
            outputs[places] += expert_reference(experts[number], states[places]) / 2
        return outputs

    turn = cycle(turns)
    weights = 3 * w1.in_features * w1.out_features
    floor = max(chosen * weights * FORMATS[name] / bench.bandwidth(), 4 * rows * weights / bench.flops(name))
    compare(
        bench,
        f"experts {name}, {rows} rows",
        floor * 1e3,
        lambda: experts(inputs, next(turn), shares),
        lambda: by_reference(inputs),
        (experts(inputs, turns[0], shares), by_reference(inputs), by_reference(inputs.float())),
    )


def compare(
    bench: Bench,
    case: str,
    floor: float,
    run: Any,
    slow: Any,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """A row of kernels: time and error of `run`, and those of the reference path; of `outputs` the last is exact."""
    got, by_reference, exact = (output.double() for output in outputs)
    errors = [((output - exact).norm() / exact.norm()).item() for output in (got, by_reference)]
    (ms, counts), slow_ms = bench.kernel(run), bench.kernel_ms(slow)
    note = f"error {errors[0]:.2g}; reference path {slow_ms:.3g} ms, error {errors[1]:.2g}"
    bench.add(case, ms=ms, floor=floor, note=note, more={"errors": errors, "reference ms": slow_ms}, **counts)


def calibration(bench: Bench) -> None:
    if bench.calibration is not None:
        bench.add("", note="was given.")
    elif bench.is_tiny:
        bench.add("", note="takes a minute, and was not run with --tiny: tables say what is expected.")
    else:
        said: list[str] = []
        with bench.case("", least=100), tempfile.TemporaryDirectory() as folder:
            bench.calibration = measured_calibration(folder, said.append)
            more = {"calibration": bench.calibration.to_dict(), "said": said}
            bench.add("", note="measured, and used below.", more=more)


@torch.no_grad()
def layers(bench: Bench) -> None:
    for name in ("int8", "fp8", "bf16", "nf4"):
        with bench.case(name):
            if name == "nf4" and find_spec("bitsandbytes") is None:
                bench.add(name, note="skipped: bitsandbytes is not installed.")
            else:
                measure_layers(bench, name, 2 if bench.is_tiny else layers_that_fit(bench, name, LAYERS))


@torch.no_grad()
def whole(bench: Bench) -> None:
    fits = layers_that_fit(bench, "fp8", ALL_LAYERS, SPARE_OF_WHOLE) if bench.is_cuda else 0
    if not bench.is_cuda:
        bench.add("", note=NEEDS_CUDA)
    elif fits < ALL_LAYERS:
        bench.add("", note=f"not run: {fits} layers in FP8 fit into what is free on this card.")
    else:
        with bench.case("", least=45):
            measure_layers(bench, "fp8", ALL_LAYERS, vocab_size=SkyworkMoeConfig.vocab_size)


def layers_that_fit(bench: Bench, name: str, wanted: int, spare: int = SPARE) -> int:
    """At most so many, and at least one."""
    if not bench.is_cuda:
        return wanted
    config = config_of(bench, 1)
    weights = 4 * config.hidden_size**2 + 3 * 16 * config.hidden_size * config.intermediate_size
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(wanted, int((free - spare) / (weights * FORMATS[name]))))


def config_of(bench: Bench, number: int, **changes: Any) -> SkyworkMoeConfig:
    """Of a model of so many layers."""
    return SkyworkMoeConfig(**{**(TINY if bench.is_tiny else REAL), "num_hidden_layers": number, **changes})


def prompt_tokens(bench: Bench) -> int:
    return 64 if bench.is_tiny else 2048


def plan_of(bench: Bench, config: Any, name: str, tokens: int, memory: dict[Any, Any] | None = None) -> PlacementPlan:
    """Where everything goes; on a device that has room for it all unless `memory` says otherwise."""
    memory = memory or {key: "9000GiB" for key in (bench.gpu, "cpu") if key is not None}
    devices = tuple(devices_of(memory, {"cpu": cpu_bandwidth() / 1e9}, here=True))
    return plan_device_map(config, devices, name, context_tokens=tokens, calibration=bench.calibration)


@cache
def cpu_bandwidth() -> float:
    return measured_bandwidth()


def expected_ms(plan: PlacementPlan, phase: str) -> float | None:
    """What a plan expects of "decode" or "prompt"; None where it knows a device too little."""
    expected = plan.placement.expected
    return sum(getattr(expected, phase).values()) * 1e3 if expected else None


def floors(bench: Bench, config: Any, name: str) -> tuple[float, float]:
    """ms of reading a token's weights, and of reading all and multiplying by a prompt's, whichever takes longer."""
    hidden, number, tokens = config.hidden_size, config.num_hidden_layers, prompt_tokens(bench)
    attention, expert = 4 * hidden**2, 3 * hidden * config.intermediate_size
    plain = 2 * hidden * (16 * number + config.vocab_size)  # gates and the LM head, in 16 bit

    def reading(experts: int) -> float:
        return (number * (attention + experts * expert) * FORMATS[name] + plain) / bench.bandwidth()

    multiplying = 2 * tokens * number * (attention + 2 * expert) / bench.flops(name)
    multiplying += 2 * tokens**2 * hidden * number / bench.flops("bf16")  # attention, half of it masked
    return reading(2) * 1e3, max(multiplying, reading(16)) * 1e3


def measure_layers(bench: Bench, name: str, number: int, **changes: Any) -> None:
    """Rows of decoding, eager and compiled, and of a prompt, of so many layers in a format."""
    config, case = config_of(bench, number, **changes), f"{name}, {number} layers"
    short, long = (plan_of(bench, config, name, tokens) for tokens in (CACHE_TOKENS, prompt_tokens(bench)))
    model = random_model(config, name, bench.device)
    decode, prompt = floors(bench, config, name)
    measure_decode(bench, f"{case}, decode eager", model, model, decode, expected_ms(short, "decode"))
    measure_prompt(bench, case, model, prompt, expected_ms(long, "prompt"))
    with bench.case(f"{case}, decode compiled"):
        torch._dynamo.reset()
        options = {"mode": "reduce-overhead"} if bench.is_cuda else {"backend": "eager"}
        forward = torch.compile(model, fullgraph=True, **options)
        measure_decode(bench, f"{case}, decode compiled", model, forward, decode, None)


def measure_decode(
    bench: Bench, case: str, model: Any, forward: Any, floor: float | None, expected: float | None
) -> None:
    """A row of decoding by `forward`, which is the model or the model compiled."""
    step = decoder(bench, model, forward)
    start = time.perf_counter()
    for _ in range(3):  # of one that is compiled: compiles, records, plays
        step()
    more = {"seconds of the first 3": time.perf_counter() - start}
    ms, host = bench.fastest(step, 2 if bench.is_tiny else TOKENS_A_RUN)
    counts, note = per_layer(bench.profiled(step, times=4), model, host)
    bench.add(case, ms=ms, floor=floor, expected=expected, note=note, more=more, **counts)


def decoder(bench: Bench, model: Any, forward: Any) -> Callable[[], Any]:
    """What decodes the next of random tokens by `forward`, with a static cache, after a short prompt."""
    ids = torch.randint(3, model.config.vocab_size, (1, CACHE_TOKENS), device=bench.device)
    positions = torch.arange(CACHE_TOKENS, device=bench.device).unsqueeze(0)
    held = {CACHE: StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)}
    model(ids[:, :SHORT], position_ids=positions[:, :SHORT], **held)
    pairs = zip(*(tensor[:, SHORT:].split(1, dim=1) for tensor in (ids, positions)), strict=True)

    def step() -> Any:
        token, position = next(pairs)
        return forward(token.clone(), position_ids=position.clone(), **held)  # as graphs want them, at multiples of 16

    return step


def measure_prompt(bench: Bench, case: str, model: Any, floor: float | None, expected: float | None) -> None:
    ids = torch.randint(3, model.config.vocab_size, (1, prompt_tokens(bench)), device=bench.device)

    def read() -> Any:
        return model(ids, use_cache=False, logits_to_keep=1)

    ms, host = bench.fastest(read)
    counts, note = per_layer(bench.profiled(read), model, host)
    bench.add(f"{case}, prompt of {ids.numel()}", ms=ms, floor=floor, expected=expected, note=note, **counts)


def per_layer(found: Profile | None, model: Any, host: float) -> tuple[dict[str, float], str]:
    """Counts of each layer, and a note of the host's time, of which `host` ms are all layers'."""
    number = model.config.num_hidden_layers
    note = f"host {host / number * 1e3:.0f} us a layer"
    return (found.counts(number), f"{note}, GPU works {found.ms:.3g} ms") if found else ({}, note)


@torch.no_grad()
def split(bench: Bench) -> None:
    if bench.gpu is None:
        bench.add("", note=NEEDS_CUDA)
        return
    config = config_of(bench, 2 if bench.is_tiny else layers_that_fit(bench, "int8", FEW_LAYERS))
    for share in SHARES:
        with bench.case(f"{share:.0%} of the experts on the GPU"):
            measure_split(bench, split_plan(bench, config, "int8", share), "int8")


def split_plan(bench: Bench, config: Any, name: str, share: float) -> PlacementPlan:
    """This share of the experts on the GPU, and the rest on the CPU."""
    tokens = prompt_tokens(bench)
    plan = plan_of(bench, config, name, tokens)
    experts = plan.bytes_per_device[bench.gpu]["experts"]
    kept = share + 0.5 / (config.num_hidden_layers * config.num_local_experts)  # a half, for what rounding takes
    beside: dict[str, int] = {}
    for _ in range(2 if share < 1 else 0):  # where some are on the CPU, what copies of them take comes on top
        for kind, size in plan.bytes_per_device[bench.gpu].items():
            beside[kind] = 0 if kind == "experts" else max(size, beside.get(kind, 0))
        memory = {bench.gpu: int(sum(beside.values()) + kept * experts), "cpu": "9000GiB"}
        plan = plan_of(bench, config, name, tokens, memory)
    return plan


def measure_split(bench: Bench, plan: PlacementPlan, name: str) -> None:
    """Rows of decoding, whose floor is the plan's bound, and of a prompt."""
    config, bound = plan.request.config, plan.tokens_per_second
    case = f"{name}, {config.num_hidden_layers} layers, {plan.experts_on(bench.gpu)} experts on the GPU"
    model = random_model(config, name, bench.device, plan)
    measure_decode(bench, f"{case}, decode", model, model, bound and 1e3 / bound, expected_ms(plan, "decode"))
    measure_prompt(bench, case, model, None, expected_ms(plan, "prompt"))


def qlora(bench: Bench) -> None:
    if find_spec("peft") is None:
        bench.add("", note="skipped: peft is not installed.")
        return
    from peft import LoraConfig, get_peft_model

    from skywork_hf.training.memory import finetuning_memory

    fits = 2 if bench.is_tiny else layers_that_fit(bench, "int8", FEW_LAYERS, SPARE_OF_TRAINING)
    config, tokens = config_of(bench, fits), prompt_tokens(bench)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    reckoned = sum(finetuning_memory(config, lora, "int8", context_tokens=tokens).nbytes.values())
    base = random_model(config, "int8", bench.device)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    ids, losses = torch.randint(3, config.vocab_size, (1, tokens), device=bench.device), []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    ms, _ = bench.fastest(step)
    peak = f"peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB, " if bench.is_cuda else ""
    note = f"{peak}{reckoned / GIB:.2f} GiB reckoned; loss {losses[0]:.3f} to {losses[-1]:.3f}"
    bench.add(f"int8, {fits} layers, a step of {tokens} tokens", ms=ms, note=note)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "card": card,
    "tests": tests,
    "kernels": kernels,
    "calibration": calibration,
    "layers": layers,
    "whole": whole,
    "split": split,
    "qlora": qlora,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--calibration", type=Path, help="what `skywork-hf calibrate` wrote on this machine")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that all of this runs")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here: `--device cpu --tiny` runs the same on a CPU.")
    transformers.logging.set_verbosity_error()
    bench = Bench(arguments)
    for line in (Row.HEAD, ["---"] * len(Row.HEAD)):
        print(f"| {' | '.join(line)} |", flush=True)
    for name in SECTIONS:
        if name in arguments.sections:
            bench.run(name, SECTIONS[name])
    print(f"\n{sum(bench.seconds.values()):.0f} seconds; as JSON in {bench.output}")


if __name__ == "__main__":
    main()
