"""Builds every Triton kernel for every generation of cards, without a card; `make test` runs it.

    python scripts/build_triton_kernels.py [75 80 86 89 90 100 120]

What is built is what would be launched for the shapes of Skywork-MoE: the launches of `triton_kernels` are noted, on
tensors without memory, and compiled for each compute capability. It fails where a kernel does not build, needs more
shared memory than a program may have there, or reads weights in pieces of less than 16 bytes: a warp's reads would
take as many instructions as there are pieces.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skywork_hf.quantization import triton_blocks, triton_kernels
from skywork_hf.quantization.cards import MAX_TOKENS, TABLE_COLUMNS

# By compute capability: how many KiB of shared memory a program may have, and a card of the table, "" for any other.
CARDS = {
    75: (64, ""),
    80: (163, "A100"),
    86: (99, "RTX 3090"),
    89: (99, "RTX 4090"),
    90: (227, "H100"),
    100: (227, ""),
    120: (99, ""),
}
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4608, 12288, 16, 2
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_MATRICES = {"gate_up_kernel": 2, "down_kernel": 1, "linear_kernel": 1}
_READS = re.compile(
    r"ld\.global[\w.:]*evict_first[\w.:]*?\.(?:v(?P<count>\d)\.)?b(?P<bits>\d+)\s|"
    r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s[^,]*,[^,]*, (?P<bytes>0x[0-9a-f]+|\d+)"
)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_everything(dtype: torch.dtype) -> None:
    """Call every kernel, for one token and for many, with inputs of a dtype."""
    formats = {torch.int8: meta(HIDDEN, dtype=torch.bfloat16), torch.float8_e4m3fn: meta(), dtype: None}
    table = meta(EXPERTS, TABLE_COLUMNS, dtype=torch.int64)
    for tokens in (1, MAX_TOKENS):
        rows = meta(tokens, HIDDEN, dtype=dtype)
        index, shares = meta(tokens, TOP_K, dtype=torch.int64), meta(tokens, TOP_K)
        for weight, scale in formats.items():
            scale_dtype = dtype if scale is None else scale.dtype
            triton_kernels.experts(rows, index, shares, table, INTERMEDIATE, weight, scale_dtype, True, False)
            triton_kernels.linear(rows, meta(HIDDEN, HIDDEN, dtype=weight), scale)
        # As experts on several GPUs have it.
        of_int8 = (table, INTERMEDIATE, torch.int8, torch.bfloat16, True, True)
        triton_kernels.experts(rows, index.to(torch.int32), shares, *of_int8)
    rows = meta(512, HIDDEN, dtype=dtype)
    triton_kernels.gate(rows, meta(EXPERTS, HIDDEN, dtype=dtype), TOP_K, 1.0)
    triton_kernels.route(meta(512, EXPERTS, dtype=dtype), TOP_K, None)
    _, token_scale = triton_kernels.quantize_int8(rows)
    triton_kernels.rescale(meta(512, HIDDEN, dtype=torch.int32), token_scale, formats[torch.int8], dtype)
    triton_kernels.quantize_fp8(rows, None)
    triton_kernels.quantize_fp8(rows, meta())


def launches(capability: int) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What would be launched on cards of a compute capability: kernel, arguments and options."""
    blocks = triton_blocks.blocks_for(CARDS[capability][1])
    noted: list[Any] = []
    replaced = {
        "_launch": lambda kernel, inputs, grid, *args, **options: noted.append((kernel, args, options)),
        "capability": lambda device: divmod(capability, 10),
        "blocks_of": lambda name, is_alone, device: blocks[name, is_alone],
    }
    with ExitStack() as patches:
        for name, replacement in replaced.items():
            patches.enter_context(patch.object(triton_kernels, name, replacement))
        call_everything(torch.bfloat16)
        if capability == min(CARDS):  # with other kernels for float16, as its tensor cores take no bfloat16
            call_everything(torch.float16)
    return iter(noted)


def compiled(capability: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """As Triton would compile it when it is launched: numbers of 1 are constants, and what divides by 16 is known."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        is_known = False
        if isinstance(value, torch.Tensor):
            signature[name], is_known = TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int) and name.islower() and value != 1:
            signature[name], is_known = "i32", value % 16 == 0
        else:
            signature[name], constants[place,] = "constexpr", value
        if is_known:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return build(
        source, GPUTarget("cuda", capability, 32), {"num_warps": options.get("num_warps", 4), "enable_fp_fusion": True}
    )


def problems(capability: int) -> list[str]:
    """Build all for a compute capability; what is wrong, in sentences."""
    found, start, count = [], time.monotonic(), 0
    for kernel, args, options in launches(capability):
        count += 1
        name = f"sm_{capability} {kernel.__name__} " + " ".join(
            str(options[key]) for key in ("FORMAT", "COMPUTE", "TOKENS") if key in options
        )
        try:
            built = compiled(capability, kernel, args, options)
        except Exception as error:
            found.append(f"{name} does not build: {type(error).__name__}: {error}")
            continue
        if built.metadata.shared > CARDS[capability][0] * 1024:
            found.append(f"{name} needs {built.metadata.shared} bytes of shared memory.")
        if kernel.__name__ in _MATRICES and not reads_widely(built, _MATRICES[kernel.__name__], options):
            found.append(f"{name} reads weights in pieces of less than 16 bytes.")
    print(f"sm_{capability}: {count} kernels in {time.monotonic() - start:.0f} s, {len(found)} problems", flush=True)
    return found


def reads_widely(built: Any, matrices: int, options: dict[str, Any]) -> bool:
    """Whether weights are read in pieces of 16 bytes: by what leaves the cache first, or what goes past registers
    where several tiles are on their way. Then so do inputs, which for one token are too few for 16 bytes a thread."""
    pieces = [
        int(match["bytes"], 0) if match["bytes"] else int(match["count"] or 1) * int(match["bits"]) // 8
        for match in _READS.finditer(built.asm["ptx"])
    ]
    threads = 32 * options["num_warps"]
    tile = options["ROWS"] * options["COLUMNS"] * (2 if options["FORMAT"] == "plain" else 1)
    has_all = pieces.count(16) >= max(1, matrices * tile // (16 * threads))
    return has_all and (options["TOKENS"] == 1 or min(pieces) == 16)


def main() -> None:
    capabilities = [int(argument) for argument in sys.argv[1:]] or list(CARDS)
    with ProcessPoolExecutor() as processes:
        found = [problem for of_one in processes.map(problems, capabilities) for problem in of_one]
    print("\n".join(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
