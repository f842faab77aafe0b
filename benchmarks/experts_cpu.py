"""Skywork-MoE on a CPU: ours beside what a user would run instead, on one layer of the real shape.

    python benchmarks/experts_cpu.py [--folder FOLDER] [--rounds 3] [--chart experts_cpu.png]

Writes a random bfloat16 checkpoint (hidden 4608, ffn 12288, 16 experts, top 2), the same weights in our int8 and FP8
and, for llama.cpp, as a Q8_0 GGUF: 15 GB. Then runs, on 2 threads: our int8, FP8 and bfloat16, transformers' Mixtral
in bfloat16 with each of its experts implementations, bitsandbytes' int8 through our classes, and llama.cpp. Each run
is a fresh process, one kind after the other in each round. Reports medians: the time of a token while decoding 32 with
a cache, fed fixed tokens that differ so that the routing does, and that of 4 and 16 tokens at a time; the time of a
prompt of 128 tokens, the second time it runs; private memory (RssAnon) after loading and at the peak of the first
prompt.

The floor of decoding is reading the active weights once (attention, two experts, head), at the bandwidth at which 2
threads sum a large tensor in the same run.

To reach: decoding in int8 at most 0.9 of llama.cpp's time (goal: 0.8), in FP8 1.3 of our int8's, in bfloat16 0.8 of
Mixtral's; the prompt in int8 at most 0.7 of Mixtral's and, of llama.cpp's, 1.5 with AVX512-VNNI and 2.5 without.
Mixtral is taken with its fastest implementation for each.

A CPU with AVX512 can stand in for one without, for torch and numba: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
NUMBA_CPU_NAME=haswell. llama.cpp is as it was built.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from load import (
    rss_anon,  # beside this file
    write_mixtral,
)

from skywork_hf.quantization import matmul

SHAPE = {
    "hidden_size": 4608,
    "intermediate_size": 12288,
    "num_hidden_layers": 1,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
}
OURS, OUR_FP8, OUR_BF16 = "skywork_hf int8", "skywork_hf fp8", "skywork_hf bf16"
MIXTRAL = "Mixtral bf16, "
LLAMA_CPP = "llama.cpp Q8_0"
BITSANDBYTES = "bitsandbytes int8"
KINDS = [
    OURS,
    OUR_FP8,
    OUR_BF16,
    MIXTRAL + "eager",
    MIXTRAL + "grouped_mm",
    MIXTRAL + "batched_mm",
    LLAMA_CPP,
    BITSANDBYTES,
]
BANDWIDTH = "bandwidth"
# It copies the chosen experts' weights for each token: 58 GB for a prompt of this length.
WITHOUT_PROMPT = [MIXTRAL + "batched_mm"]
# So slow on a CPU that one round has to do, and not all tokens.
ONE_ROUND = [MIXTRAL + "batched_mm", BITSANDBYTES]
DECODE_SECONDS = 10.0
# What is told of each: the column's head, its unit in seconds, and its decimals.
PHASES = {
    "decode": ("1 token, ms", 1e-3, 1),
    "rows 4": ("4, ms", 1e-3, 1),
    "rows 16": ("16, ms", 1e-3, 1),
    "prompt": ("128, s", 1.0, 3),
    "loaded": ("loaded, GiB", 2**30, 3),
    "peak": ("peak, GiB", 2**30, 3),
}
# Phase, whose time, to be at most how many times whose.
GOALS = [
    ("decode", OURS, 0.9, LLAMA_CPP),
    ("decode", OUR_FP8, 1.3, OURS),
    ("decode", OUR_BF16, 0.8, MIXTRAL),
    ("prompt", OURS, 0.7, MIXTRAL),
    ("prompt", OURS, 1.5 if matmul._has_vnni() else 2.5, LLAMA_CPP),
]

THREADS = 2
READ_BYTES = 2**30
TOKENS = random.Random(0).sample(range(300, SHAPE["vocab_size"]), 128 + 32)
PROMPT, SHORT_PROMPT, DECODED = TOKENS[:128], TOKENS[:8], TOKENS[128:]

Measured = dict[str, float | None]


def write_checkpoints(folder: Path) -> None:
    """What is not there yet of: `bf16`, `mixtral` (the same files under another config), `int8` and `q8_0.gguf`."""
    if not (folder / "bf16").exists():
        write_bf16(folder / "bf16")
    if not (folder / "mixtral").exists():
        write_mixtral(folder / "mixtral", folder / "bf16")
    for method in ("int8", "fp8"):
        if not (folder / method).exists():
            write_quantized(folder / method, folder / "bf16", method)
    if not (folder / "q8_0.gguf").exists() and missing_package(LLAMA_CPP) is None:
        write_gguf(folder / "q8_0.gguf", folder / "bf16")


def write_bf16(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from skywork_hf import SkyworkMoeConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SkyworkMoeConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")


def write_quantized(folder: Path, bf16: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    from skywork_hf import SkyworkFp8Config, SkyworkInt8Config

    config = SkyworkInt8Config() if method == "int8" else SkyworkFp8Config()
    model = AutoModelForCausalLM.from_pretrained(bf16, quantization_config=config, dtype="bfloat16")
    model.save_pretrained(folder, max_shard_size="1GB")


def write_gguf(file: Path, bf16: Path) -> None:
    """Under llama.cpp's names. It orders the rotary dimensions in another way, on which speed does not depend."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    q8_0 = gguf.GGMLQuantizationType.Q8_0
    stored = {name: path for path in bf16.glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118

    def read(name: str) -> Any:
        with safe_open(stored[f"{name}.weight"], "pt") as opened:
            return opened.get_tensor(f"{name}.weight").float().numpy()

    def quantized(name: str) -> Any:
        return gguf.quants.quantize(read(name), q8_0)

    writer = gguf.GGUFWriter(file, "llama")
    write_gguf_header(writer)
    for theirs, ours in {"token_embd": "model.embed_tokens", "output": "lm_head"}.items():
        writer.add_tensor(f"{theirs}.weight", quantized(ours), raw_dtype=q8_0)
    writer.add_tensor("output_norm.weight", read("model.norm"))
    for layer in range(SHAPE["num_hidden_layers"]):
        block, source = f"blk.{layer}", f"model.layers.{layer}"
        attention = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
        for theirs, ours in attention.items():
            writer.add_tensor(f"{block}.{theirs}.weight", quantized(f"{source}.self_attn.{ours}"), raw_dtype=q8_0)
        plain = {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "block_sparse_moe.gate",
        }
        for theirs, ours in plain.items():
            writer.add_tensor(f"{block}.{theirs}.weight", read(f"{source}.{ours}"))
        for theirs, ours in {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}.items():
            experts = [f"{source}.block_sparse_moe.experts.{i}.{ours}" for i in range(SHAPE["num_local_experts"])]
            stacked = np.stack([quantized(expert) for expert in experts])
            writer.add_tensor(f"{block}.{theirs}.weight", stacked, raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_header(writer: Any) -> None:
    vocabulary, heads = SHAPE["vocab_size"], SHAPE["num_attention_heads"]
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(SHAPE["hidden_size"] // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(SHAPE["num_local_experts"])
    writer.add_expert_used_count(SHAPE["num_experts_per_tok"])
    writer.add_vocab_size(vocabulary)
    # A vocabulary that llama.cpp accepts: three special tokens, every byte, and words that nobody reads.
    words = [f"<0x{byte:02X}>" for byte in range(256)] + [f"word{i}" for i in range(vocabulary - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *words])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocabulary - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def missing_package(kind: str) -> str | None:
    """The name of a package that `kind` needs and that is not installed."""
    needed = {LLAMA_CPP: ["llama_cpp", "gguf"], BITSANDBYTES: ["bitsandbytes"]}.get(kind, [])
    return next((package for package in needed if find_spec(package) is None), None)


class TransformersRunner:
    def __init__(self, folder: Path, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, **options)

    def start(self, tokens: list[int]) -> None:
        """Run a prompt on an empty cache."""
        self.cache = None
        self.go_on(tokens)

    @torch.no_grad()
    def go_on(self, tokens: list[int]) -> None:
        from skywork_hf.compat import CACHE

        outputs = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        self.cache = outputs[CACHE]


class LlamaCppRunner:
    def __init__(self, file: Path) -> None:
        from llama_cpp import Llama

        options = {"n_threads": THREADS, "n_threads_batch": THREADS, "n_batch": 512}
        # Without `logits_all` it computes the last layer, which here is the only one, for the last token alone.
        self.model = Llama(str(file), n_ctx=512, verbose=False, logits_all=True, **options)

    def start(self, tokens: list[int]) -> None:
        self.model.reset()
        self.go_on(tokens)

    def go_on(self, tokens: list[int]) -> None:
        self.model.eval(tokens)


def load(folder: Path, kind: str) -> TransformersRunner | LlamaCppRunner:
    if kind == LLAMA_CPP:
        return LlamaCppRunner(folder / "q8_0.gguf")
    if kind == BITSANDBYTES:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_8bit=True)
        return TransformersRunner(folder / "bf16", quantization_config=quantization, dtype="bfloat16")
    if kind.startswith(MIXTRAL):
        return TransformersRunner(folder / "mixtral", experts_implementation=kind.removeprefix(MIXTRAL))
    return TransformersRunner(folder / kind.removeprefix("skywork_hf "))


def measure_here(folder: Path, kind: str) -> Measured:
    """Load and run in this process."""
    torch.set_num_threads(THREADS)
    if kind == BANDWIDTH:
        return {"bytes_per_second": read_bandwidth()}
    import_module("llama_cpp" if kind == LLAMA_CPP else "skywork_hf")  # whose own memory is not to be counted
    before = rss_anon()
    runner = load(folder, kind)
    measured: Measured = dict.fromkeys(PHASES) | {"loaded": rss_anon() - before}
    if kind not in WITHOUT_PROMPT:
        # The first time reads the files and is watched, which costs time; the second is what a user waits for.
        measured["peak"] = peak_rss_anon(lambda: runner.start(PROMPT)) - before
        measured["prompt"] = seconds_of(lambda: runner.start(PROMPT))
    runner.start(SHORT_PROMPT[:1])
    for token in SHORT_PROMPT[1:]:  # one by one, for those without prompt too
        runner.go_on([token])
    for phase, tokens in {"decode": 1, "rows 4": 4, "rows 16": 16}.items():
        if tokens == 1 or kind not in WITHOUT_PROMPT:
            measured[phase] = seconds_of_tokens(runner, tokens)
    return measured


def seconds_of_tokens(runner: TransformersRunner | LlamaCppRunner, at_a_time: int) -> float:
    """The time of so many tokens that follow each other; the median, without the first of several rows."""
    times: list[float] = []
    for start in range(0, len(DECODED), at_a_time):
        if sum(times) < DECODE_SECONDS:
            tokens = DECODED[start : start + at_a_time]
            times.append(seconds_of(lambda: runner.go_on(tokens)))  # noqa: B023
    return statistics.median(times[1:] or times)


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_bandwidth() -> float:
    values = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / min(seconds_of(values.sum) for _ in range(10))


def peak_rss_anon(run: Callable[[], object]) -> int:
    """The most private memory that a second thread sees while `run` runs."""
    seen, done = [rss_anon()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(*seen, rss_anon())


def measure(folder: Path, kind: str) -> Measured | None:
    """Measure in a fresh process; None, and a sentence, where that fails."""
    command = [sys.executable, __file__, "--folder", str(folder), "--here", kind]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(f"{kind} failed: {(run.stderr.splitlines() or [f'exit status {run.returncode}'])[-1]}", flush=True)
        return None
    return json.loads(run.stdout.splitlines()[-1])


def measure_all(folder: Path, rounds: int) -> tuple[dict[str, Measured], float]:
    """The medians of each kind that runs here, and the bytes a second of reading."""
    kinds = []
    for kind in KINDS:
        if package := missing_package(kind):
            print(f"{kind} is left out: {package} is not installed.")
        else:
            kinds.append(kind)
    runs: dict[str, list[Measured]] = {kind: [] for kind in [BANDWIDTH, *kinds]}
    for number in range(rounds):
        for kind in list(runs):
            if number and kind in ONE_ROUND:
                continue
            if measured := measure(folder, kind):
                runs[kind].append(measured)
            elif kind in (BANDWIDTH, OURS):
                sys.exit("Without it there is nothing to compare.")
            else:
                del runs[kind]
    bandwidth = medians(runs.pop(BANDWIDTH))["bytes_per_second"]
    return {kind: medians(of) for kind, of in runs.items()}, bandwidth


def medians(runs: list[Measured]) -> Any:
    return {
        name: None if value is None else statistics.median(run[name] for run in runs)
        for name, value in runs[0].items()
    }


def active_bytes(bytes_per_weight: int) -> int:
    """What decoding a token has to read: the embedding row and the head are in 16 bit for all kinds of ours."""
    hidden = SHAPE["hidden_size"]
    experts = SHAPE["num_experts_per_tok"] * 3 * hidden * SHAPE["intermediate_size"]
    per_layer = (4 * hidden**2 + experts) * bytes_per_weight
    return SHAPE["num_hidden_layers"] * per_layer + 2 * hidden * (SHAPE["vocab_size"] + 1)


def fastest(measured: dict[str, Measured], phase: str, prefix: str) -> str | None:
    kinds = [kind for kind, of in measured.items() if kind.startswith(prefix) and of[phase] is not None]
    return min(kinds, key=lambda kind: measured[kind][phase], default=None)


def print_table(measured: dict[str, Measured]) -> None:
    print(f"\n{'':24}" + "".join(f"{head:>14}" for head, _, _ in PHASES.values()))
    for kind, of in measured.items():
        cells = [
            f"{'-':>14}" if of[phase] is None else f"{of[phase] / unit:14.{decimals}f}"
            for phase, (_, unit, decimals) in PHASES.items()
        ]
        print(f"{kind:24}" + "".join(cells))


def print_goals(measured: dict[str, Measured], floors: dict[str, float]) -> None:
    print(f"\n{'times of':60}{'to reach':>10}{'got':>8}")
    for phase, ours, goal, of in GOALS:
        peer = fastest(measured, phase, of)
        if peer and ours in measured:
            print(f"{f'{phase}: {ours} / {peer}':60}{goal:10.2f}{measured[ours][phase] / measured[peer][phase]:8.2f}")
    for kind, bits in ((OURS, "int8"), (OUR_FP8, "int8"), (OUR_BF16, "bf16")):
        if kind in measured:
            print(f"{f'decode: {kind} / its floor':60}{'':10}{measured[kind]['decode'] / floors[bits]:8.2f}")


def draw(measured: dict[str, Measured], floors: dict[str, float], file: Path) -> None:
    """Decode and prompt side by side; of Mixtral's implementations the fastest for each."""
    if find_spec("matplotlib") is None:
        print("No chart is drawn: matplotlib is not installed.")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 3.6), layout="constrained")
    panels = [("decode", 1e3, "decode, ms per token"), ("prompt", 1.0, "prompt of 128 tokens, seconds")]
    for axis, (phase, unit, title) in zip(axes, panels, strict=True):
        others = [fastest(measured, phase, kind) for kind in (OUR_FP8, OUR_BF16, MIXTRAL, LLAMA_CPP, BITSANDBYTES)]
        kinds = [OURS, *(kind for kind in others if kind)]
        values = [measured[kind][phase] * unit for kind in kinds]
        bars = axis.barh(kinds, values, color=["tab:orange", *["tab:blue"] * (len(kinds) - 1)])
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.invert_yaxis()
        # A peer that is many times slower would flatten all others: its bar is cut, its number stays.
        limit = 1.2 * max(value for value in values if value <= 1.5 * statistics.median_high(values))
        axis.set_xlim(0, limit)
        for kind, value in zip(kinds, values, strict=True):
            if value > limit:
                axis.text(limit * 0.99, kind, f"{value:.3g} (bar cut)", ha="right", va="center", color="white")
        axis.set_title(f"{title} (shorter is better)")
    for (bits, floor), style in zip(floors.items(), ("-", ":"), strict=True):
        axes[0].axvline(floor * 1e3, color="black", linestyle=style, label=f"floor of {bits}: {floor * 1e3:.1f} ms")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    figure.suptitle(f"One layer of Skywork-MoE's shape on a CPU, {THREADS} threads")
    figure.savefig(file, dpi=120)
    print(f"Chart: {file}")


def compare(folder: Path, rounds: int, chart: Path) -> None:
    write_checkpoints(folder)
    capability = f"{torch.backends.cpu.get_cpu_capability()} (VNNI {matmul._has_vnni()})"
    print(f"torch {torch.__version__}, {capability}, {THREADS} threads, {rounds} rounds", flush=True)
    measured, bandwidth = measure_all(folder, rounds)
    floors = {"int8": active_bytes(1) / bandwidth, "bf16": active_bytes(2) / bandwidth}
    print_table(measured)
    print(f"\nfloor of decoding, reading at {bandwidth / 1e9:.1f} GB/s: ", end="")
    print(", ".join(f"{bits} {floor * 1e3:.1f} ms" for bits, floor in floors.items()))
    print_goals(measured, floors)
    draw(measured, floors, chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are or shall be; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chart", type=Path, default=Path("experts_cpu.png"))
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure_here(arguments.folder, arguments.here)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(arguments.folder or Path(temporary), arguments.rounds, arguments.chart)


if __name__ == "__main__":
    main()
