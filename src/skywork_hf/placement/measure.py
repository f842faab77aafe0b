"""Measuring this machine with the package's own layers, for `skywork-hf calibrate`."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..compat import CACHE
from ..configuration_skywork import SkyworkMoeConfig
from ..modeling_skywork_moe import SkyworkMoeExpert, SkyworkMoeForCausalLM
from ..quantization import formats, matmul
from ..quantization.experts import use_cpu_kernels
from ..quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear
from ..quantization.quantizers import linears_to_quantize
from .calibration import Calibration, this_machine
from .devices import CPU, Device, measured_bandwidth
from .pages import forget, pages_of, read_only_when_told, resident, will_be_read
from .rates import EXPERT, LINEAR, MEASURED_METHODS, PARTS, Disk, KernelRate, Rates
from .speed import expected_kernel

# A half of Skywork-MoE's experts in each direction, so many that no cache holds them.
_HIDDEN, _INTERMEDIATE, _EXPERTS = 2304, 6144, 4
_SHAPE: dict[str, Any] = {"hidden_size": _HIDDEN, "intermediate_size": _INTERMEDIATE, "num_attention_heads": 18}
_ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
# What makes the host's work all of the time; and what makes reading and writing hidden states much of it.
_TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
_WIDE: dict[str, Any] = {**_TINY, "hidden_size": 1024, "intermediate_size": 8, "num_attention_heads": 8}
_WIDE_TOKENS = 8, 64  # sequences, and tokens of each
_LAYERS = (1, 5)
_TOP_K = 2
# A kernel runs until it has taken so many seconds, and at least so often.
_SECONDS, _LEAST_RUNS, _MOST_RUNS = 0.2, 3, 1000
# Bytes: of a file that is read from the disk in pieces of two sizes, each so often; and of copies.
_FILE, _PIECES, _PIECE_RUNS = 3 * 2**26, (2**22, 2**25), 4
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
    return Calibration(machine, cpu, tuple(gpus), disk)


def _device_rates(device: torch.device, name: str, say: Say) -> Rates:
    memory = measured_bandwidth(str(device))
    say(f"  memory: {memory / 1e9:.1f} GB/s")
    layer, expert, step = _host(device, say)
    kernels = _kernels(device, expert, say)
    fastest = max(_itemsize(rate.method) * 1e9 / rate.seconds for rate in kernels)
    attention = _attention(device)
    elements = _elements(device, layer[""] + 16 * expert[""], attention)
    say(f"  attention: {attention / 1e9:.0f} GFLOP/s; hidden values of a layer: {elements / 1e9:.2f} billion a second")
    bus = {} if device.type == CPU else _bus(device, say)
    return Rates(
        name=name,
        is_measured=True,
        memory=max(memory, fastest),
        kernels=tuple(kernels),
        layer=layer,
        expert=expert,
        step=step,
        elements=elements,
        attention=attention,
        **bus,
    )


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some runs, until the device is done; of the first, where that takes long."""
    times = [_seconds(run, device)]
    if times[0] > _SECONDS:
        return times[0]
    while len(times) <= _LEAST_RUNS or (sum(times) < _SECONDS and len(times) <= _MOST_RUNS):
        times.append(_seconds(run, device))
    return min(times[1:])


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _kernels(device: torch.device, host: dict[str, float], say: Say) -> list[KernelRate]:
    """Of experts, and of their linears one by one, without the host's seconds of an expert."""
    rates: list[KernelRate] = []
    for method in MEASURED_METHODS:
        experts = nn.ModuleList([_expert(method, device) for _ in range(_EXPERTS)])
        use_cpu_kernels(experts)
        linears = [getattr(expert, name) for expert in experts for name in ("w1", "w2", "w3")]
        weights = _EXPERTS * 3 * _HIDDEN * _INTERMEDIATE
        for rows in _ROWS:
            inputs = {columns: _random(rows, columns, device) for columns in (_HIDDEN, _INTERMEDIATE)}
            hidden, kernel = inputs[_HIDDEN], _kernel(method, device, rows)
            for part, run, calls in (
                (EXPERT, lambda: [expert(hidden) for expert in experts], len(experts)),  # noqa: B023
                (LINEAR, lambda: [linear(inputs[linear.in_features]) for linear in linears], len(linears) / 3),  # noqa: B023
            ):
                seconds = _fastest(run, device)
                least = seconds / 2  # what remains of a host that was slow for once
                rate = max(least, seconds - calls * host[method]) / weights * 1e9
                rates.append(KernelRate(part, method, kernel, rows, rate))
            say(f"  {method or 'bf16'} experts, {rows} rows, {kernel}: {_of(rates[-2], rows)}")
        rates += _without_kernels_of_their_own(method, linears, device)
    return rates


def _of(rate: KernelRate, rows: int) -> str:
    return f"{_itemsize(rate.method) / rate.seconds:.3g} GB/s, {2 * rows / rate.seconds:.3g} GFLOP/s"


def _itemsize(method: str) -> int:
    return 1 if method else 2


def _without_kernels_of_their_own(method: str, linears: list[Any], device: torch.device) -> list[KernelRate]:
    """Of what runs where no faster kernel takes the shape or the dtype."""
    kernel, chosen = "dequantize" if method else "linear", linears[:3]

    def compute(linear: Any, rows: torch.Tensor) -> torch.Tensor:
        if method:
            return matmul.dequantized_linear(rows, linear.codes, linear.weight_scale)
        return F.linear(rows, linear.weight)

    rates = []
    for number in (1, 64):
        rows = {columns: _random(number, columns, device) for columns in (_HIDDEN, _INTERMEDIATE)}
        seconds = _fastest(lambda: [compute(linear, rows[linear.in_features]) for linear in chosen], device)  # noqa: B023
        rate = seconds / (3 * _HIDDEN * _INTERMEDIATE) * 1e9
        rates += [KernelRate(part, method, kernel, number, rate) for part in PARTS]
    return rates


def _kernel(method: str, device: torch.device, rows: int) -> str:
    there = Device(CPU if device.type == CPU else 0, "", 0, None, matmul.has_fp8_unit(device))
    return expected_kernel(method, there, torch.bfloat16, SkyworkMoeConfig(**_SHAPE), rows)


def _random(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns).bfloat16().to(device)


def _expert(method: str, device: torch.device) -> SkyworkMoeExpert:
    with torch.device("meta"):
        expert = SkyworkMoeExpert(SkyworkMoeConfig(**_SHAPE))
    for name in ("w1", "w2", "w3"):
        linear = getattr(expert, name)
        weight = torch.randn(linear.out_features, linear.in_features).bfloat16()
        setattr(expert, name, _linear(method, weight, device))
    return expert


def _linear(method: str, weight: torch.Tensor, device: torch.device) -> nn.Linear:
    """Of random values, which begin in memory where files have them."""
    out_features, in_features = weight.shape
    if not method:
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(_as_in_files(weight, device), requires_grad=False)
        return linear
    kind: Any = SkyworkInt8Linear if method == "int8" else SkyworkFp8Linear
    quantized = kind(in_features, out_features, device="meta")
    codes, scale = (formats.quantize_int8 if method == "int8" else formats.quantize_fp8)(weight)
    quantized.weight = nn.Parameter(_as_in_files(codes, device), requires_grad=False)
    quantized.weight_scale = nn.Parameter(scale.to(device), requires_grad=False)
    return quantized


def _as_in_files(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy; on a CPU it begins at 8 bytes beyond a multiple of 16, as weights that are mapped may."""
    if device.type != CPU:
        return tensor.to(device)
    memory = torch.empty(tensor.nbytes + 8, dtype=torch.uint8)[8:].view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor)


def _host(device: torch.device, say: Say) -> tuple[dict[str, float], dict[str, float], float]:
    """By method, the host's seconds of a layer without experts and of an expert; and of a step beside its layers."""
    layer, expert, step = {}, {}, math.inf
    for method in MEASURED_METHODS:
        few, more = (_step(_model(method, device, layers, _TINY), device) for layers in _LAYERS)
        one = _model(method, device, 1, _TINY).model.layers[0].block_sparse_moe.experts[0]
        row = _random(1, _TINY["hidden_size"], device)
        expert[method] = _fastest(lambda: [one(row) for _ in range(10)], device) / 10  # noqa: B023
        whole = max(0.0, more - few) / (_LAYERS[1] - _LAYERS[0])
        layer[method] = max(0.0, whole - _TOP_K * expert[method])
        step = min(step, max(0.0, few - _LAYERS[0] * whole))
        times = f"{layer[method] * 1e6:.0f} us a layer, {expert[method] * 1e6:.0f} us an expert"
        say(f"  host, {method or 'bf16'}: {times}")
    return layer, expert, step


def _model(method: str, device: torch.device, layers: int, shape: dict[str, Any]) -> Any:
    config = SkyworkMoeConfig(**shape, num_hidden_layers=layers, num_experts_per_tok=_TOP_K, pad_token_id=0)
    model: Any = SkyworkMoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for name, linear in linears_to_quantize(model, None).items() if method else ():
        model.set_submodule(name, _linear(method, linear.weight.data, device))
    model.to(device)
    use_cpu_kernels(model)
    return model


def _step(model: Any, device: torch.device) -> float:
    """Seconds of decoding a token."""
    token = torch.ones(1, 1, dtype=torch.int64).to(device)
    options: dict[str, Any] = {CACHE: model(token)[CACHE]}
    return _fastest(lambda: model(token, **options), device)


def _attention(device: torch.device) -> float:
    """Multiplications and additions a second, half of which a causal mask hides and nobody does."""
    heads, tokens, dim = 16, 512, 128
    states = _random(heads * tokens, dim, device).view(1, heads, tokens, dim)
    seconds = _fastest(lambda: F.scaled_dot_product_attention(states, states, states, is_causal=True), device)
    return 2 * tokens**2 * heads * dim / seconds


def _elements(device: torch.device, host: float, attention: float) -> float:
    """Hidden values a second of a layer in a prompt: of layers that multiply by next to nothing.

    Args:
        host: seconds of the host for a layer and its experts.
    """
    sequences, tokens = _WIDE_TOKENS
    prompt = torch.ones(sequences, tokens, dtype=torch.int64).to(device)
    few, more = (
        _fastest(lambda: model(prompt, logits_to_keep=1), device)  # noqa: B023
        for model in (_without_matmuls(_model("", device, layers, _WIDE)) for layers in _LAYERS)
    )
    values = sequences * tokens * _WIDE["hidden_size"]
    whole = (more - few) / (_LAYERS[1] - _LAYERS[0])
    rest = whole - host - 2 * values * tokens / attention
    return values / max(rest, more / _LAYERS[1] / 4)  # at least a quarter, where noise left less


def _without_matmuls(model: Any) -> Any:
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, nn.Identity())
    return model


def _bus(device: torch.device, say: Say) -> dict[str, float]:
    """Between a GPU and the host, and the slowest of its ways to other GPUs."""
    pin = device.type == "cuda"
    on_host, small = torch.zeros(_COPY, dtype=torch.uint8, pin_memory=pin), torch.zeros(16, pin_memory=pin)
    there, small_there = on_host.to(device), small.to(device)
    to = _COPY / _fastest(lambda: there.copy_(on_host, non_blocking=True), device)
    back = _COPY / _fastest(lambda: on_host.copy_(there, non_blocking=True), device)
    mapped = torch.zeros(_COPY, dtype=torch.uint8)  # not pinned, as weights are not
    streaming = _COPY / _fastest(lambda: there.copy_(mapped), device)
    others = [torch.device("cuda", n) for n in range(torch.cuda.device_count()) if n != device.index] if pin else []
    peers = [_COPY / _fastest(lambda: there.to(other), other) for other in others]  # noqa: B023
    found = {
        "wait": _fastest(lambda: small_there.tolist(), device),
        "latency": _fastest(lambda: small_there.copy_(small, non_blocking=True), device),
        "bus": min(to, back),
        "streaming": streaming,
        "peer": min(peers, default=math.inf),
    }
    say(f"  bus: {to / 1e9:.1f} GB/s to it, {back / 1e9:.1f} back, {found['wait'] * 1e6:.0f} us to wait")
    return found


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
        pages = _pages_of(mapped)
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
    """The median time in which so many bytes come from the disk."""
    forget(_pages_of(mapped), descriptor)
    times = []
    for piece in mapped.split(size // mapped.itemsize)[:: max(1, _FILE // size // _PIECE_RUNS)]:
        start = time.perf_counter()
        will_be_read(_pages_of(piece))
        piece.sum()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _pages_of(mapped: torch.Tensor) -> list[range]:
    return pages_of(nn.ParameterList([nn.Parameter(mapped, requires_grad=False)]))
