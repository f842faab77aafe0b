"""Measuring this machine with the package's own layers, for `skywork-hf calibrate`."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..configuration_skywork import SkyworkMoeConfig
from ..modeling_skywork_moe import SkyworkMoeExpert, SkyworkMoeForCausalLM
from ..quantization import formats, gpu_kernels, matmul
from ..quantization.experts import use_cpu_kernels, use_gpu_kernels
from ..quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear, SkyworkQuantizedLinear
from ..quantization.quantizers import linears_to_quantize
from .calibration import Calibration, this_machine
from .devices import CPU, Device, measured_bandwidth
from .pages import forget, pages_of, read_only_when_told, resident, will_be_read
from .rates import EXPERT, LINEAR, MEASURED_METHODS, Disk, KernelRate, Rates
from .speed import expected_kernel

# A half of Skywork-MoE's experts in each direction, so many that no cache holds them.
_HIDDEN, _INTERMEDIATE, _EXPERTS = 2304, 6144, 4
_SHAPE: dict[str, Any] = {"hidden_size": _HIDDEN, "intermediate_size": _INTERMEDIATE, "num_attention_heads": 18}
_ROWS, _MANY_ROWS, _FALLBACK_ROWS = (1, 2, 4, 8, 16, 32, 64, 256), 32, (1, 64)
# Layers of which the host's work is much; and prompts in which reading and writing hidden states is much.
_SMALL: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "vocab_size": 64}
_WIDE: dict[str, Any] = {**_SMALL, "hidden_size": 1024, "intermediate_size": 8, "num_attention_heads": 8}
_WIDE_TOKENS = 8, 64  # sequences, and tokens of each
# Decoded one after the other, so that experts change, and weights come from memory.
_DECODED = 8
_LAYERS = (1, 5)
_EXPERTS_OF_A_LAYER, _TOP_K = 16, 2
# Heads, tokens, width: of them, multiplications and additions, the half that a causal mask hides left away.
_ATTENTION = 16, 512, 128
_ATTENTION_WORK = 2 * 16 * 512**2 * 128
# In each of some rounds a kernel runs for so many seconds, and at least twice where it takes less than a long time.
_ROUNDS, _SECONDS, _LONG = 2, 0.06, 0.4
# Bytes: of a file that is read from the disk in pieces of two sizes, so many of each in so many rounds; and of copies.
_FILE, _PIECES, _PIECES_A_ROUND, _DISK_ROUNDS = 2**28, (2**23, 2**27), 8, 4
_COPY = 2**26

Say = Callable[[str], None]


@torch.no_grad()
def measured_calibration(folder: str | Path, say: Say) -> Calibration:
    """Measure the CPU, each GPU, and the disk that `folder` is on. Takes about a minute.

    Args:
        say: is told of each figure.

    Raises:
        OSError: nothing can be written into the folder.
    """
    machine = this_machine()
    say(f"{machine['CPU']}, {machine['instructions']}, {machine['threads']} threads")
    disk = _disk(Path(folder), say)
    cpu = _device_rates(torch.device(CPU), machine["CPU"], say)
    gpus = []
    for number, name in enumerate(machine["GPUs"]):
        say(f"GPU {number}, {name}")
        gpus.append(_device_rates(torch.device("cuda", number), name, say))
    _values.cache_clear()
    return Calibration(machine, cpu, tuple(gpus), disk)


def _device_rates(device: torch.device, name: str, say: Say) -> Rates:
    kernels, host, others = _kernel_runs(device), _host_runs(device), _other_runs(device)
    fastest = _fastest({**kernels, **host, **others}, device, say)
    memory = measured_bandwidth(str(device))
    large = {run[1]: fastest[run] / run[4] for run in kernels if run[0] == EXPERT and run[3] == 1 and run[4] > 1}
    layer, expert, step = _host({run: fastest[run] for run in host}, large)
    small = {run[1:3]: fastest[run] / run[3] for run in host if run[0] == "experts"}
    rates = [_rate(of, fastest[of], small, expert) for of in kernels]
    attention = _ATTENTION_WORK / fastest["attention"]
    elements = _elements(fastest["few"], fastest["more"], layer[""] + _EXPERTS_OF_A_LAYER * expert[""], attention)
    bus = {} if device.type == CPU else _bus(device)
    found = Rates(
        name=name,
        is_measured=True,
        memory=max(memory, *(_bytes_of(run) / fastest[run] for run in kernels)),
        kernels=tuple(rates),
        layer=layer,
        expert=expert,
        step=step,
        elements=elements,
        attention=attention,
        **bus,
    )
    _say_all(found, say)
    return found


def _say_all(rates: Rates, say: Say) -> None:
    say(f"  memory {rates.memory / 1e9:.1f} GB/s; attention {rates.attention / 1e9:.0f} GFLOP/s in prompts")
    for method, seconds in rates.layer.items():
        expert = rates.expert[method]
        say(f"  host, {method or 'bf16'}: {seconds * 1e6:.0f} us a layer, {expert * 1e6:.0f} us an expert")
    for rate in rates.kernels:
        if rate.part == EXPERT:
            speed = f"{_itemsize(rate.method) / rate.seconds:.3g} GB/s, {2 * rate.rows / rate.seconds:.3g} GFLOP/s"
            say(f"  expert in {rate.method or 'bf16'}, rows {rate.rows}, {rate.kernel}: {speed}")
    if math.isfinite(rates.bus):
        wait = f"{rates.wait * 1e6:.0f} us to wait"
        say(f"  bus {rates.bus / 1e9:.1f} GB/s, {rates.streaming / 1e9:.1f} for mapped weights, {wait}")


def _fastest(runs: dict[Any, Callable[[], Any]], device: torch.device, say: Say) -> dict[Any, float]:
    """Seconds of the fastest call of each, until the device is done; round after round, so that a busy moment of the
    machine spoils none."""
    fastest = dict.fromkeys(runs, math.inf)
    for number in range(_ROUNDS):
        say(f"  round {number + 1} of {_ROUNDS}")
        for name, run in runs.items():
            fastest[name] = min(fastest[name], _fastest_now(run, device))
    return fastest


def _fastest_now(run: Callable[[], Any], device: torch.device) -> float:
    """Of some calls; of the first, which also warms up, where that takes long."""
    times = [_seconds(run, device)]
    while sum(times) < _SECONDS or (len(times) == 1 and times[0] < _LONG):
        times.append(_seconds(run, device))
    return min(times[1:] or times)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _kernel_runs(device: torch.device) -> dict[Any, Callable[[], Any]]:
    """By part, method, kernel, rows, and the number of experts that are run: the kernels that the package takes, and
    those that it takes where no faster one fits the shape or the dtype."""
    runs: dict[Any, Callable[[], Any]] = {}
    for method in MEASURED_METHODS:
        all_experts = nn.ModuleList([_expert(method, device) for _ in range(_EXPERTS)])
        use_cpu_kernels(all_experts)
        use_gpu_kernels(all_experts)
        for rows in _ROWS:
            # Many rows compute, and need not be kept from caches.
            experts = list(all_experts)[: _EXPERTS if rows < _MANY_ROWS else 1]
            inputs = {columns: _random(rows, columns, device) for columns in (_HIDDEN, _INTERMEDIATE)}
            linears = [getattr(expert, name) for expert in experts for name in ("w1", "w2", "w3")]
            kernel, count = _kernel(method, device, rows), len(experts)
            runs[EXPERT, method, kernel, rows, count] = partial(_run_experts, experts, inputs[_HIDDEN])
            runs[LINEAR, method, kernel, rows, count] = partial(_run_linears, linears, inputs)
            if rows in _FALLBACK_ROWS:
                fallback = "dequantize" if method else "linear"
                runs.setdefault((LINEAR, method, fallback, rows, 1), partial(_run_fallback, linears[:3], inputs))
                runs.setdefault((EXPERT, method, fallback, rows, 1), partial(_run_fallback, linears[:3], inputs))
    return runs


def _run_experts(experts: list[Any], rows: torch.Tensor) -> None:
    for expert in experts:
        expert(rows)


def _run_linears(linears: list[Any], inputs: dict[int, torch.Tensor]) -> None:
    for linear in linears:
        linear(inputs[linear.in_features])


def _run_fallback(linears: list[Any], inputs: dict[int, torch.Tensor]) -> None:
    for linear in linears:
        rows = inputs[linear.in_features]
        if isinstance(linear, SkyworkQuantizedLinear):
            matmul.dequantized_linear(rows, linear.codes, linear.weight_scale)
        else:
            F.linear(rows, linear.weight)


def _rate(of: Any, seconds: float, small: dict[Any, float], host: dict[str, float]) -> KernelRate:
    """What a weight takes and what a call, of a large expert and a small one; of linears all is
    the weights'.

    Args:
        small: by method and rows, seconds of an expert of `_SMALL`.
        host: by method, what is counted for an expert's call already.
    """
    part, method, kernel, rows, experts = of
    weights, fewer = 3 * _HIDDEN * _INTERMEDIATE, 3 * _SMALL["hidden_size"] * _SMALL["intermediate_size"]
    of_a_weight = seconds / experts / weights
    if part == LINEAR:
        return KernelRate(part, method, kernel, rows, of_a_weight * 1e9)
    slope = (seconds / experts - small[method, rows]) / (weights - fewer)
    slope = max(slope, of_a_weight / 2)
    call = max(0.0, small[method, rows] - slope * fewer - host[method])
    return KernelRate(part, method, kernel, rows, slope * 1e9, call)


def _bytes_of(run: Any) -> int:
    """Of the weights that one of `_kernel_runs` reads; of one expert's, which stay in caches, none."""
    _, method, _, _, experts = run
    return experts * 3 * _HIDDEN * _INTERMEDIATE * _itemsize(method) if experts > 1 else 0


def _itemsize(method: str) -> int:
    return 1 if method else 2


def _kernel(method: str, device: torch.device, rows: int) -> str:
    has = {"has_fp8_unit": matmul.has_fp8_unit(device), "has_triton": gpu_kernels.has_triton(device)}
    there = Device(CPU if device.type == CPU else 0, "", 0, **has)
    return expected_kernel(method, there, torch.bfloat16, SkyworkMoeConfig(**_SHAPE), rows)


def _random(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns).bfloat16().to(device)


def _expert(method: str, device: torch.device) -> SkyworkMoeExpert:
    with torch.device("meta"):
        expert = SkyworkMoeExpert(SkyworkMoeConfig(**_SHAPE))
    for name in ("w1", "w2", "w3"):
        linear = getattr(expert, name)
        setattr(expert, name, _linear(method, linear.out_features, linear.in_features, device))
    return expert


def _linear(method: str, out_features: int, in_features: int, device: torch.device) -> nn.Linear:
    """Of random values, which begin in memory where files have them."""
    kind: Any = {"": partial(nn.Linear, bias=False), "int8": SkyworkInt8Linear, "fp8": SkyworkFp8Linear}[method]
    linear: Any = kind(in_features, out_features, device="meta")
    values, scale = _values(method, out_features, in_features)
    linear.weight = nn.Parameter(_as_in_files(values, device), requires_grad=False)
    if scale is not None:
        linear.weight_scale = nn.Parameter(scale.to(device), requires_grad=False)
    return linear


@cache
def _values(method: str, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random ones and their scale, the same for all linears of a shape: making them takes longer than measuring."""
    if not method:
        return torch.randn(out_features, in_features, dtype=torch.bfloat16).mul_(in_features**-0.5), None
    weight, _ = _values("", out_features, in_features)
    return (formats.quantize_int8 if method == "int8" else formats.quantize_fp8)(weight)


def _as_in_files(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy; on a CPU it begins at 8 bytes beyond a multiple of 16, as weights that are mapped may."""
    if device.type != CPU:
        return tensor.to(device)
    memory = torch.empty(tensor.nbytes + 8, dtype=torch.uint8)[8:].view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor)


def _host_runs(device: torch.device) -> dict[Any, Callable[[], Any]]:
    """By method, tokens of models of few and of more layers, and all experts of the latter one after the other."""
    runs: dict[Any, Callable[[], Any]] = {}
    tokens = [torch.tensor([[number + 1]]).to(device) for number in range(_DECODED)]
    for method in MEASURED_METHODS:
        for layers in _LAYERS:
            model = _model(method, device, layers, _SMALL)
            runs["tokens", method, layers] = partial(_run_tokens, model, tokens)
        experts = [expert for layer in model.model.layers for expert in layer.block_sparse_moe.experts]
        for rows in _ROWS:
            some = experts if rows < _MANY_ROWS else experts[:_EXPERTS]
            inputs = _random(rows, _SMALL["hidden_size"], device)
            runs["experts", method, rows, len(some)] = partial(_run_experts, some, inputs)
    return runs


def _run_tokens(model: Any, tokens: list[torch.Tensor]) -> None:
    for token in tokens:
        model(token, use_cache=True)


def _host(fastest: dict[Any, float], large: dict[str, float]) -> tuple[dict[str, float], dict[str, float], float]:
    """By method, the host's seconds of a layer without experts and of an expert, calls of kernels and cold caches
    among them; and of a step beside its layers.

    Args:
        fastest: of `_host_runs`.
        large: by method, seconds of a large expert for one row.
    """
    few, more = _LAYERS
    hidden = _SMALL["hidden_size"]
    of_an_expert = 3 * hidden * _SMALL["intermediate_size"]
    layer, expert, steps = {}, {}, []
    for method in MEASURED_METHODS:
        one, other = (fastest["tokens", method, layers] / _DECODED for layers in _LAYERS)
        small = min(fastest[run] / run[3] for run in fastest if run[:3] == ("experts", method, 1))
        weight = max(0.0, large[method] - small) / (3 * _HIDDEN * _INTERMEDIATE - of_an_expert)
        expert[method] = max(0.0, small - of_an_expert * weight)
        whole = max(0.0, other - one) / (more - few)
        layer[method] = max(0.0, whole - _TOP_K * small - 4 * hidden**2 * weight)
        steps.append(max(0.0, one - few * whole))
    return layer, expert, min(steps)


def _model(method: str, device: torch.device, layers: int, shape: dict[str, Any]) -> Any:
    config = SkyworkMoeConfig(**shape, num_hidden_layers=layers, num_experts_per_tok=_TOP_K, pad_token_id=0)
    with torch.device("meta"):
        model: Any = SkyworkMoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    linears = linears_to_quantize(model, None)
    for name, linear in linears.items():
        model.set_submodule(name, _linear(method, linear.out_features, linear.in_features, device))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.randn(parameter.shape, dtype=parameter.dtype)))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.to(device)
    use_cpu_kernels(model)
    use_gpu_kernels(model)
    return model


def _other_runs(device: torch.device) -> dict[Any, Callable[[], Any]]:
    """Attention of a prompt; and prompts of layers that multiply by next to nothing, few and more of them."""
    heads, tokens, width = _ATTENTION
    states = _random(heads * tokens, width, device).view(1, heads, tokens, width)
    attention = partial(F.scaled_dot_product_attention, states, states, states, is_causal=True)
    runs: dict[Any, Callable[[], Any]] = {"attention": attention}
    prompt = torch.ones(_WIDE_TOKENS, dtype=torch.int64).to(device)
    for name, layers in zip(("few", "more"), _LAYERS, strict=True):
        model = _without_matmuls(_model("", device, layers, _WIDE))
        runs[name] = partial(model, prompt, logits_to_keep=1)
    return runs


def _elements(few: float, more: float, host: float, attention: float) -> float:
    """Hidden values a second of a layer in a prompt, of the seconds of `_other_runs`.

    Args:
        host: seconds of the host for a layer and its experts.
        attention: operations a second.
    """
    sequences, tokens = _WIDE_TOKENS
    values = sequences * tokens * _WIDE["hidden_size"]
    rest = (more - few) / (_LAYERS[1] - _LAYERS[0]) - host - 2 * values * tokens / attention
    return values / max(rest, more / _LAYERS[1] / 4)  # at least a quarter, where noise left less


def _without_matmuls(model: Any) -> Any:
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, nn.Identity())
    return model


def _bus(device: torch.device) -> dict[str, float]:
    """Between a GPU and the host, and the slowest of its ways to other GPUs."""
    pin = device.type == "cuda"
    pinned, small = torch.zeros(_COPY, dtype=torch.uint8, pin_memory=pin), torch.zeros(16, pin_memory=pin)
    mapped = torch.zeros(_COPY, dtype=torch.uint8)  # not pinned, as weights are not
    there, small_there = pinned.to(device), small.to(device)
    others = [torch.device("cuda", n) for n in range(torch.cuda.device_count()) if n != device.index] if pin else []
    runs: dict[Any, Callable[[], Any]] = {
        "to": partial(there.copy_, pinned, non_blocking=True),
        "back": partial(pinned.copy_, there, non_blocking=True),
        "streaming": partial(there.copy_, mapped),
        "wait": small_there.tolist,
        "latency": partial(small_there.copy_, small, non_blocking=True),
        **{other: partial(there.to, other) for other in others},
    }
    seconds = {name: _fastest_now(run, device) for name, run in runs.items()}
    return {
        "wait": seconds["wait"],
        "latency": seconds["latency"],
        "bus": _COPY / max(seconds["to"], seconds["back"]),
        "streaming": _COPY / seconds["streaming"],
        "peer": min((_COPY / seconds[other] for other in others), default=math.inf),
    }


def _disk(folder: Path, say: Say) -> Disk | None:
    """As weights are read: mapped, the kernel being told of each piece before it is used. None, and a sentence, where
    the folder's files stay in memory."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="skywork-hf-calibrate-") as file:
        block = torch.randint(0, 256, (2**20,), dtype=torch.uint8).numpy().tobytes()
        for _ in range(_FILE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        mapped = torch.from_file(file.name, shared=False, size=_FILE // 8, dtype=torch.int64)
        pages = pages_of([mapped])
        read_only_when_told(pages)
        forget(pages, file.fileno())
        if resident(pages[0]) > 0.5:
            say(f"disk: {folder} stays in memory, so it was not measured; give --folder on the disk of the weights")
            return None
        few, many = (_piece_seconds(mapped, size, file.fileno()) for size in _PIECES)
    bandwidth = (_PIECES[1] - _PIECES[0]) / max(many - few, 1e-9)
    latency = max(0.0, few - _PIECES[0] / bandwidth)
    say(f"disk: {bandwidth / 1e9:.2f} GB/s after {latency * 1e3:.2f} ms")
    return Disk(bandwidth, latency)


def _piece_seconds(mapped: torch.Tensor, size: int, descriptor: int) -> float:
    """The time in which so many bytes come from the disk and are first touched: the mean of some pieces, as a disk
    that others use is now fast and now slow, in the fastest round."""
    means = []
    for _ in range(_DISK_ROUNDS):
        forget(pages_of([mapped]), descriptor)
        pieces = mapped.split(size // mapped.itemsize)[:_PIECES_A_ROUND]
        start = time.perf_counter()
        for piece in pieces:
            will_be_read(pages_of([piece]))
            piece.sum()
        means.append((time.perf_counter() - start) / len(pieces))
    return min(means)
