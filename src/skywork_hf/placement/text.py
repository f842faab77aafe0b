"""Plans in words and letters, for a terminal."""

from __future__ import annotations

from collections import defaultdict

import torch

from .devices import CPU, DISK, GIB, Key
from .precision import PLAIN
from .problem import KINDS, Solution
from .sizes import KV_CACHE_BACKENDS, KV_CACHE_BITS
from .speed import Seconds, largest_share

_COLUMNS = ("dense", "experts", "KV cache", "working", "margin", "total", "budget", "read a token")
_OVERFLOW = "experts may compute values beyond 65,504, which float16 cannot hold"
_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def describe(plan: Solution) -> str:
    """The table of devices in GiB, the map, and the bound."""
    return "\n".join([f"{plan.request.title}; GiB", *_table(plan), "", *_map(plan), "", *_conclusions(plan)])


def _table(plan: Solution) -> list[str]:
    weights = {device.key: _weights(plan, device.key) for device in plan.request.devices}
    width = max(map(len, weights.values())) + 1
    rows = [f"{'device':16}{'weights':{width}}" + "".join(f"{name:>{_width(name)}}" for name in _COLUMNS)]
    for device in plan.request.devices:
        kinds = plan.bytes_per_device[device.key]
        read = plan.bytes_read_per_token.get(device.key, 0)
        sizes = [*(kinds[kind] for kind in KINDS), sum(kinds.values()), device.budget, read]
        cells = "".join(
            f"{size / GIB:{_width(name)}.{_digits(size)}f}" for name, size in zip(_COLUMNS, sizes, strict=True)
        )
        rows.append(f"{f'{device.key} {device.name}':16}{weights[device.key]:{width}}{cells}")
    return rows


def _width(column: str) -> int:
    return max(10, len(column) + 2)


def _digits(size: float) -> int:
    """Decimals that show a small model's sizes too."""
    return 2 if size >= GIB // 10 or size == 0 else 5


def device_name(plan: Solution, key: Key) -> str:
    """A device as people call it: "GPU 0 rtx4090", "CPU"."""
    if key in (CPU, DISK):
        return str(key).upper() if key == CPU else "disk"
    name = next((device.name for device in plan.request.gpus if device.key == key), "")
    return f"GPU {key} {name}".rstrip()


def _weights(plan: Solution, key: Key) -> str:
    precision = plan.request.precision
    method = precision.methods.get(key, PLAIN) or str(precision.dtype).removeprefix("torch.")
    return f"{method} ({plan.kernel(key)})" if plan.weight_bytes(key) else "-"


def _map(plan: Solution) -> list[str]:
    """One line a layer: the device of its dense part, then that of each expert."""
    placement = plan.placement
    if not any(placement.experts):
        return ["layers  " + "".join(map(letter, placement.dense))]
    lines = ["layer  dense  experts"]
    for number, (dense, experts) in enumerate(zip(placement.dense, placement.experts, strict=True)):
        lines.append(f"{number:5}  {letter(dense):5}  {''.join(map(letter, experts))}")
    return lines


def letter(key: Key) -> str:
    """One character for a device: a GPU's number, c for the CPU, d for the disk."""
    if key in (CPU, DISK):
        return str(key)[0]
    number = int(key) if str(key).isdigit() else int(str(key).rpartition(":")[2] or 0)
    return _LETTERS[number % len(_LETTERS)]


def _conclusions(plan: Solution) -> list[str]:
    lines = [f"at most {bound(plan)}", *_expected(plan)]
    total = sum(map(len, plan.placement.experts))
    away = plan.experts_on(CPU, DISK)
    if away and plan.request.gpus:
        rows = plan.placement.stream_from_rows
        lines.append(
            f"{away} of {total} experts are not on a GPU; those on the CPU are computed there, and "
            + ("never copied to a GPU" if rows is None else f"copied to a GPU where they get {rows} rows of a prompt")
        )
    return [*lines, *slow_paths(plan), *_about_float16(plan), *_about_the_cache(plan), *_about_the_margin(plan)]


def slow_paths(plan: Solution) -> list[str]:
    """What is slower than the bound says: weights that are unpacked, and cards that are older than bfloat16."""
    unpacked = [
        device.key
        for device in plan.request.devices
        if plan.weight_bytes(device.key) and plan.kernel(device.key) == "dequantize"
    ]
    lines = []
    if unpacked:
        lines.append(
            f"{', '.join(map(str, unpacked))}: no fast kernel for one token of {_weights(plan, unpacked[0])}; each "
            "matmul unpacks its weights first, which only the expected speed counts"
        )
    old = [str(gpu.key) for gpu in plan.request.gpus if gpu.has_bf16_unit is False]
    if plan.request.precision.dtype is torch.bfloat16 and old:
        instead = f"float16 is faster there{f', but {_OVERFLOW}' if _has_experts(plan) else ''}"
        lines.append(f"{', '.join(old)}: no bfloat16 unit, so it is slower there than the bound says; {instead}")
    return lines


def _about_the_margin(plan: Solution) -> list[str]:
    used = [gpu for gpu in plan.request.gpus if plan.bytes_per_device[gpu.key]["margin"]]
    kinds = ", ".join(f"{kind} {size:.3g}" for kind, size in used[0].margin_by_kind.items()) if used else ""
    return [f"margin, GiB of a GPU's budget: {kinds}"] if used else []


def _about_the_cache(plan: Solution) -> list[str]:
    """How to have the cache that is planned."""
    held = plan.request.kv_cache_dtype
    if held is None:
        return []
    config = {"backend": KV_CACHE_BACKENDS[held], **({} if held == "fp8" else {"nbits": KV_CACHE_BITS[held]})}
    engines = ', engines with kv_cache_dtype="fp8"' if held == "fp8" else ""
    return [f'KV cache in {held}: generate(cache_implementation="quantized", cache_config={config}){engines}']


def _about_float16(plan: Solution) -> list[str]:
    is_float16 = plan.request.precision.dtype is torch.float16
    return [f"float16: {_OVERFLOW}; bfloat16 and float32 can"] if is_float16 and _has_experts(plan) else []


def _has_experts(plan: Solution) -> bool:
    return hasattr(plan.request.config, "num_local_experts")


def bound(plan: Solution) -> str:
    """The bound on tokens a second, and what sets it."""
    if not plan.tokens_per_second or not plan.placement.reading.seconds:
        unknown = [str(d.key) for d in plan.request.devices if d.bandwidth is None and plan.weight_bytes(d.key)]
        return (
            f"an unknown number of tokens a second: give the bandwidth of {', '.join(unknown)}, or a calibration of "
            "that machine"
        )
    kind, key, share = largest_share(plan.placement.reading.seconds)
    where = device_name(plan, key)
    return f"{plan.tokens_per_second:.3g} tokens a second, {share:.0%} of the time reading {kind} on {where}"


def expected(plan: Solution) -> str:
    """The expected tokens a second, and what takes the time."""
    found = plan.placement.expected
    if found is None:
        return "an unknown number of tokens a second"
    return f"{plan.expected_tokens_per_second:.3g} tokens a second ({_shares(plan, found.decode)})"


def _expected(plan: Solution) -> list[str]:
    """Of decoding and of a prompt, and where the figures come from; nothing where they are unknown."""
    found = plan.placement.expected
    if found is None:
        return []
    seconds, prompts = sum(found.prompt.values()), "a prompt" if plan.request.batch_size == 1 else "prompts"
    used = [device.key for device in plan.request.devices if device.key != DISK and plan.weight_bytes(device.key)]
    tables = dict.fromkeys(device_name(plan, key).partition(" ")[0] for key in used if key not in found.measured)
    source = f"from tables, not measured: {', '.join(tables)}" if tables else "from speeds that were measured"
    return [
        f"expected {expected(plan)}",
        f"expected {seconds:.3g} s for {prompts} of {found.prompt_tokens:,} tokens ({_shares(plan, found.prompt)})",
        f"expected speeds are {source}",
    ]


def _shares(plan: Solution, seconds: Seconds) -> str:
    """The three largest shares of the time, GPUs together."""
    shares: dict[str, float] = defaultdict(float)
    for (kind, key), amount in seconds.items():
        is_one_of_many = key not in (CPU, DISK) and len(plan.request.gpus) > 1
        shares[_what(kind, "GPUs" if is_one_of_many else device_name(plan, key))] += amount
    largest = sorted(shares, key=lambda what: -shares[what])[:3]
    return ", ".join(f"{shares[what] / sum(shares.values()):.0%} {what}" for what in largest)


def _what(kind: str, where: str) -> str:
    named = {"host": f"launching for {where}", "waits": f"waiting for {where}", "copies": f"copying to {where}"}
    return named.get(kind, "reading the disk" if kind == "disk" else f"{kind} on {where}")
