"""Matmuls of few rows on a CPU, about as fast as the weights can be read: numba compiles the loops below.

Weights are read where they are, mapped files included, wherever they begin, and unpacked in registers:

* int8, a scale for each row;
* FP8 (e4m3), one scale: its bits in float32's places are 2^120 too small, the difference of the two exponent biases,
  which the outputs' factor makes up for. Subnormals are exact; a NaN becomes 480, as in `formats.unpack`;
* bfloat16, the upper half of a float32.

Inputs and sums are float32. An expert, `w2(silu(w1(x)) * w3(x))`, is one piece of work, in float32 up to its output.

The work is cut into chunks of weight rows. The calling thread and its helpers take chunks until none is left: nobody
waits for a thread that has not woken, and any number of threads may call. Helpers are torch's own OpenMP threads,
which look for work for milliseconds after each of torch's operations, and would keep threads of a pool from the cores.
In a forked child, where those are gone, and where torch has no such threads, there is a pool. numba's own parallel
loops are no use: with its OpenMP layer a forked child dies, and with `workqueue` two callers at a time abort.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Bytes of weights in a chunk: some tens of microseconds of work.
CHUNK_BYTES, UNPACKED_CHUNK_BYTES = 2**20, 2**16
# Work on fewer bytes of weights is done by the caller alone: a thread that sleeps takes longer to wake.
ALONE_BYTES = 2**19
# Columns that are multiplied at a time, while those four rows further on are fetched: processors look ahead within a
# page only, and a row is longer. (One row of inputs took 1.6 times as long without.)
_TILE = 512
# After so many looks at a counter, about a millisecond, a thread lets others have its core. (A helper that goes sooner
# is missed: a chunk takes less.)
_LOOKS = 1_000_000
# Kernels from the cache take less.
_SECONDS_TO_COMPILE = 1.0

# What a job is, in int64: two counters, alone in their cache line, sizes, addresses, and room for float32 values.
_NEXT, _DONE = 0, 1
_ROWS, _INPUTS, _OUTPUTS, _IS_BFLOAT16 = 8, 9, 10, 11  # _ROWS: 0 where values of a W2 are the outputs
_COLUMNS, _HIDDEN, _FEATURES, _HIDDEN_CHUNK, _CHUNK = 12, 13, 14, 15, 16  # _HIDDEN: 0 for a linear
_W1, _W3, _W2 = 17, 20, 23  # of each the weight's address, the scales' and the scales' form; a linear is a W2 alone
_HEADER = 32
_NO_SCALE, _ONE_SCALE, _FLOAT32_SCALES, _BFLOAT16_SCALES = range(4)
# FP8 inputs are brought near this power of two: products with weights that are 2^120 too small stay normal numbers.
_FP8_INPUTS, _FP8_BIAS = 60, 120

# Sums in any order, which vectors need. Not more: NaN and infinity are as real as elsewhere.
_SUMS = {"reassoc", "contract"}
_int8, _fp8, _bfloat16 = types.CPointer(types.int8), types.CPointer(types.uint8), types.CPointer(types.uint16)
_float32, _int64 = types.CPointer(types.float32), types.CPointer(types.int64)
_I32, _I64, _FLOAT, _BYTES = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.IntType(8).as_pointer()


def _pointer_to(pointer: types.CPointer) -> Any:
    @intrinsic
    def at_address(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at_address


int8_at, fp8_at, bfloat16_at, float32_at, int64_at = map(_pointer_to, (_int8, _fp8, _bfloat16, _float32, _int64))


@intrinsic
def get(typing_context: Any, pointer: Any, index: Any) -> Any:
    """What a pointer has at an index: an int64 as it is, all else as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.load(builder.gep(args[0], [args[1]]))
        stored.align = 1
        if pointer in (_float32, _int64):
            return stored
        if pointer == _int8:
            return builder.sitofp(stored, _FLOAT)
        if pointer == _bfloat16:
            return builder.bitcast(builder.shl(builder.zext(stored, _I32), _I32(16)), _FLOAT)
        # The sign is extended to the left of its place, and cleared between there and the other bits.
        bits = builder.shl(builder.sext(stored, _I32), _I32(20))
        return builder.bitcast(builder.and_(bits, _I32(0x87F00000)), _FLOAT)

    return (types.int64 if pointer == _int64 else types.float32)(pointer, types.int64), generate


@intrinsic
def put(typing_context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Store a float32 as it is, or rounded to bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, value = builder.gep(args[0], [args[1]]), args[2]
        if pointer == _bfloat16:
            bits = builder.bitcast(value, _I32)
            is_odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            nearest = builder.add(builder.add(bits, _I32(0x7FFF)), is_odd)
            # Of a NaN the addition might make an infinity.
            bits = builder.select(builder.fcmp_unordered("uno", value, value), _I32(0x7FC00000), nearest)
            value = builder.trunc(builder.lshr(bits, _I32(16)), ir.IntType(16))
        builder.store(value, place).align = 1
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


@intrinsic
def fetch(typing_context: Any, pointer: Any, index: Any) -> Any:
    """Have the processor begin to read what a pointer has at an index, into the cache of the core. Nothing need be
    there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(builder.gep(args[0], [args[1]]), _BYTES)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [_BYTES], ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
        )
        builder.call(prefetch, [place, _I32(0), _I32(2), _I32(1)])  # to read, into the second cache, of data
        return context.get_dummy_value()

    return types.void(pointer, types.int64), generate


@intrinsic
def in_line(typing_context: Any, pointer: Any) -> Any:
    """How many of a pointer's values are in a cache line."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _I64(64 * 8 // pointer.dtype.bitwidth)

    return types.int64(pointer), generate


@intrinsic
def at_same(typing_context: Any, pointer: Any, address: Any) -> Any:
    """A pointer of the same type to an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(pointer))

    return pointer(pointer, types.int64), generate


@intrinsic
def float32_behind(typing_context: Any, job: Any, values: Any) -> Any:
    """The place behind a job's header and so many float32 values."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        behind = builder.bitcast(builder.gep(args[0], [_I64(_HEADER)]), context.get_value_type(_float32))
        return builder.gep(behind, [args[1]])

    return _float32(_int64, types.int64), generate


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def see(typing_context: Any, pointer: Any, index: Any) -> Any:
    """A counter that other threads count up, and all that they wrote before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "seq_cst", 8)

    return types.int64(_int64, types.int64), generate


@intrinsic
def count(typing_context: Any, pointer: Any, index: Any, seen: Any) -> Any:
    """Add one to a counter that still is what was seen; whether it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, one_more = builder.gep(args[0], [args[1]]), builder.add(args[2], _I64(1))
        return builder.extract_value(builder.cmpxchg(place, args[2], one_more, "seq_cst", "seq_cst"), 1)

    return types.boolean(_int64, types.int64, types.int64), generate


@njit(fastmath=_SUMS)
def _one_by_four(x: Any, i: Any, w: Any, a: Any, b: Any, c: Any, d: Any, columns: Any) -> Any:
    """One row of inputs, from `i` on, by four rows of weights, which share its values in registers."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for k in range(columns):
        value = get(x, i + k)
        s0 += value * get(w, a + k)
        s1 += value * get(w, b + k)
        s2 += value * get(w, c + k)
        s3 += value * get(w, d + k)
    return s0, s1, s2, s3


@njit(fastmath=_SUMS)
def _two_by_four(x: Any, i: Any, j: Any, w: Any, a: Any, b: Any, c: Any, d: Any, columns: Any) -> Any:
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = np.float32(0)
    for k in range(columns):
        value, other = get(x, i + k), get(x, j + k)
        w0, w1, w2, w3 = get(w, a + k), get(w, b + k), get(w, c + k), get(w, d + k)
        s0 += value * w0
        s1 += value * w1
        s2 += value * w2
        s3 += value * w3
        t0 += other * w0
        t1 += other * w1
        t2 += other * w2
        t3 += other * w3
    return s0, s1, s2, s3, t0, t1, t2, t3


@njit
def _scale_of(job: Any, weight: Any, row: Any) -> Any:
    form = get(job, weight + 2)
    if form == _NO_SCALE:
        return np.float32(1)
    if form == _BFLOAT16_SCALES:
        return get(bfloat16_at(get(job, weight + 1)), row)
    return get(float32_at(get(job, weight + 1)), 0 if form == _ONE_SCALE else row)


@njit(error_model="numpy")
def _give(job: Any, target: Any, row: Any, feature: Any, value: Any) -> Any:
    """Bring an output of a matmul to where it belongs."""
    if target == _W2:
        place = row * get(job, _FEATURES) + feature
        if get(job, _IS_BFLOAT16):
            put(bfloat16_at(get(job, _OUTPUTS)), place, value)
        else:
            put(float32_at(get(job, _OUTPUTS)), place, value)
        return
    hidden = float32_behind(job, get(job, _ROWS) * get(job, _COLUMNS))
    place = row * get(job, _HIDDEN) + feature
    if target == _W1:
        put(hidden, place, value)
    else:
        gate = get(hidden, place)
        put(hidden, place, gate / (np.float32(1) + math.exp(-gate)) * value)


@njit
def _fetch(w: Any, first: Any, columns: Any, length: Any) -> Any:
    """These columns of four rows."""
    for row in range(4):
        begin = first + row * columns
        for k in range(begin, begin + length, in_line(w)):
            fetch(w, k)


@njit
def _multiply(
    job: Any, weight: Any, w: Any, bias: Any, x: Any, powers: Any, columns: Any, start: Any, stop: Any
) -> Any:
    """These rows of a weight by all rows of inputs: four by one or two at a time, the last ones twice where they are
    fewer."""
    rows, last = get(job, _ROWS), stop - 1
    for feature in range(start, stop, 4):
        a, b = feature * columns, min(feature + 1, last) * columns
        c, d = min(feature + 2, last) * columns, min(feature + 3, last) * columns
        for row in range(0, rows, 2):
            other = min(row + 1, rows - 1)
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = np.float32(0)
            for k in range(0, columns, _TILE):
                length = min(_TILE, columns - k)
                if row == 0:
                    _fetch(w, a + 4 * columns + k, columns, length)
                i, j = row * columns + k, other * columns + k
                if row == other:
                    one = _one_by_four(x, i, w, a + k, b + k, c + k, d + k, length)
                    s0, s1, s2, s3 = s0 + one[0], s1 + one[1], s2 + one[2], s3 + one[3]
                else:
                    two = _two_by_four(x, i, j, w, a + k, b + k, c + k, d + k, length)
                    s0, s1, s2, s3 = s0 + two[0], s1 + two[1], s2 + two[2], s3 + two[3]
                    t0, t1, t2, t3 = t0 + two[4], t1 + two[5], t2 + two[6], t3 + two[7]
            sums, others = (s0, s1, s2, s3), (t0, t1, t2, t3)
            for n in range(min(4, stop - feature)):
                scale = _scale_of(job, weight, feature + n)
                _give(job, weight, row, feature + n, sums[n] * bias * get(powers, row) * scale)
                if row != other:
                    _give(job, weight, other, feature + n, others[n] * bias * get(powers, other) * scale)


@njit
def _unpack(job: Any, weights: Any, is_fp8: Any, start: Any, stop: Any) -> Any:
    """The values of a W2 from `start` to `stop`, in the dtype of the outputs."""
    factor = np.float32(2.0**_FP8_BIAS if is_fp8 else 1.0)
    if get(job, _IS_BFLOAT16):
        outputs = bfloat16_at(get(job, _OUTPUTS))
        for k in range(start, stop):
            put(outputs, k, get(weights, k) * factor)
    else:
        values = float32_at(get(job, _OUTPUTS))
        for k in range(start, stop):
            put(values, k, get(weights, k) * factor)


@njit
def _prepare(source: Any, x: Any, powers: Any, rows: Any, columns: Any, is_fp8: Any) -> Any:
    """Inputs as float32; for FP8 each row times a power of two, whose inverse (but for 2^_FP8_INPUTS) is kept."""
    for row in range(rows):
        begin = row * columns
        largest: Any = np.int32(0)
        for k in range(columns):
            value = get(source, begin + k)
            put(x, begin + k, value)
            largest = max(largest, bits_of(value) & np.int32(0x7FFFFFFF))
        power = np.float32(1)
        if is_fp8:
            exponent = np.float64(min(max((largest >> 23) - 127, -67), 127))
            power, factor = np.float32(2.0**exponent), np.float32(2.0 ** (_FP8_INPUTS - exponent))
            for k in range(columns):
                put(x, begin + k, get(x, begin + k) * factor)
        put(powers, row, power)


@njit
def _work(job: Any, weights: Any, is_fp8: Any) -> Any:
    """Take chunks until none is left, and wait until all are done: False where that takes long."""
    rows, columns, hidden, features = get(job, _ROWS), get(job, _COLUMNS), get(job, _HIDDEN), get(job, _FEATURES)
    hidden_chunk, chunk = get(job, _HIDDEN_CHUNK), get(job, _CHUNK)
    x, hidden_values = float32_behind(job, 0), float32_behind(job, rows * columns)
    powers = float32_behind(job, rows * (columns + hidden))
    hidden_powers = float32_behind(job, rows * (columns + hidden + 1))
    bias = np.float32(2.0 ** (_FP8_BIAS - _FP8_INPUTS) if is_fp8 else 1.0)
    # The inputs; what is hidden, and its preparation; the outputs. Each needs what comes before it.
    gates = 1
    hidden_ready = gates + (hidden + hidden_chunk - 1) // hidden_chunk
    downs = hidden_ready + (1 if hidden else 0)
    end = downs + (features + chunk - 1) // chunk
    while True:
        mine = see(job, _NEXT)
        if mine >= end:
            break
        needed = downs if mine >= downs else hidden_ready if mine >= hidden_ready else gates if mine >= gates else 0
        if not _wait(job, needed):
            return False
        if not count(job, _NEXT, mine):
            continue
        if mine == 0:
            if get(job, _IS_BFLOAT16):
                _prepare(bfloat16_at(get(job, _INPUTS)), x, powers, rows, columns, is_fp8)
            else:
                _prepare(float32_at(get(job, _INPUTS)), x, powers, rows, columns, is_fp8)
        elif not rows:
            start, stop = (mine - downs) * chunk, min((mine - downs + 1) * chunk, features)
            _unpack(job, at_same(weights, get(job, _W2)), is_fp8, start * columns, stop * columns)
        elif hidden_ready <= mine < downs:
            _prepare(hidden_values, hidden_values, hidden_powers, rows, hidden, is_fp8)
        else:
            is_gating = mine < hidden_ready
            size, rows_of_weight = (hidden_chunk, hidden) if is_gating else (chunk, features)
            start = (mine - (gates if is_gating else downs)) * size
            is_first = is_gating or not hidden
            for weight in range(_W1 if is_gating else _W2, _W2 if is_gating else _W2 + 1, _W3 - _W1):
                _multiply(
                    job,
                    weight,
                    at_same(weights, get(job, weight)),
                    bias,
                    x if is_first else hidden_values,
                    powers if is_first else hidden_powers,
                    columns if is_first else hidden,
                    start,
                    min(start + size, rows_of_weight),
                )
        while not count(job, _DONE, see(job, _DONE)):
            pass
    return _wait(job, end)


@njit
def _wait(job: Any, chunks: Any) -> Any:
    for _ in range(_LOOKS):  # noqa: SIM110  # numba knows no generators in `any`
        if see(job, _DONE) >= chunks:
            return True
    return False


def _int8_kernel(job: Any) -> Any:
    return _work(int64_at(job), int8_at(0), False)


def _fp8_kernel(job: Any) -> Any:
    return _work(int64_at(job), fp8_at(0), True)


def _bfloat16_kernel(job: Any) -> Any:
    return _work(int64_at(job), bfloat16_at(0), False)


# Called from Python with the address of a job; without the interpreter's lock, as ctypes does all its calls.
Kernel = Callable[[int], bool]
_SOURCES = {torch.int8: _int8_kernel, torch.float8_e4m3fn: _fp8_kernel, torch.bfloat16: _bfloat16_kernel}
_kernels: dict[torch.dtype, Kernel] = {}
_compiling = threading.Lock()


def linear(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`inputs @ real(weight).T`.

    Args:
        inputs: [rows, in_features], at least one row, bfloat16 or float32, on the CPU.
        weight: int8, float8_e4m3fn or bfloat16 [out_features, in_features], contiguous, beginning at any address.
        scale: a float dtype, one element or [out_features]; None with bfloat16.

    Returns:
        [rows, out_features] in the dtype of `inputs`, summed in float32.
    """
    return _run(inputs, [(weight, scale)])


def expert(inputs: torch.Tensor, weights: list[torch.Tensor], scales: list[torch.Tensor] | list[None]) -> torch.Tensor:
    """`w2(silu(w1(inputs)) * w3(inputs))`, the tensors as in `linear`.

    Args:
        inputs: [rows, hidden_size].
        weights: of w1, w3 (both [intermediate_size, hidden_size]) and w2, all of one dtype.
        scales: in the same order.

    Returns:
        [rows, hidden_size] in the dtype of `inputs`.
    """
    return _run(inputs, list(zip(weights, scales, strict=True)))


def unpack(weight: torch.Tensor, values: torch.Tensor) -> None:
    """Fill `values`, of the same shape, contiguous, with the codes of a weight without its scale: bfloat16 and float32
    hold them exactly. What a weight may be stands at `linear`."""
    _start(values[:0], values, [(weight, None)])


def _run(inputs: torch.Tensor, matrices: list[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
    outputs = inputs.new_empty(inputs.shape[0], matrices[-1][0].shape[0])
    _start(inputs.contiguous(), outputs, matrices)
    return outputs


def _start(
    inputs: torch.Tensor, outputs: torch.Tensor, matrices: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> None:
    """Describe a job, do it, and return when it is done."""
    rows, columns = inputs.shape
    first, last = matrices[0][0], matrices[-1][0]
    features, width = last.shape
    hidden = width if len(matrices) > 1 else 0
    addresses = (inputs.data_ptr(), outputs.data_ptr(), inputs.dtype == torch.bfloat16)
    chunk_bytes = CHUNK_BYTES if rows else UNPACKED_CHUNK_BYTES
    hidden_chunk = _chunk(2 * columns, first.itemsize, chunk_bytes)
    sizes = (columns, hidden, features, hidden_chunk, _chunk(width, last.itemsize, chunk_bytes))
    fields, kept = [], []
    for weight, scale in matrices:
        scale, form = _scale_field(scale)
        fields += [weight.data_ptr(), 0 if scale is None else scale.data_ptr(), form]
        kept.append(scale)
    if not hidden:
        fields *= 3
    job = np.empty(_HEADER + rows * (columns + hidden + 2) // 2 + 1, np.int64)
    job[: _W2 + 3] = (0, 0, 0, 0, 0, 0, 0, 0, rows, *addresses, *sizes, *fields)
    kernel = _kernels.get(last.dtype) or _compiled(last.dtype)
    helpers = torch.get_num_threads() - 1
    address = job.ctypes.data
    try:
        if helpers and sum(weight.nbytes for weight, _ in matrices) >= ALONE_BYTES:
            _work_together(kernel, job, address, helpers)
    finally:
        _finish(kernel, address)


def _chunk(columns: int, itemsize: int, chunk_bytes: int) -> int:
    """Weight rows in a chunk, a multiple of the four that are read together."""
    return max(4, chunk_bytes // (columns * itemsize) // 4 * 4)


def _scale_field(scale: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Scales in a dtype that the kernels read, and their form."""
    if scale is None:
        return None, _NO_SCALE
    if scale.numel() == 1:
        return scale.float(), _ONE_SCALE
    if scale.dtype == torch.bfloat16:
        return scale.contiguous(), _BFLOAT16_SCALES
    return scale.float().contiguous(), _FLOAT32_SCALES


def _finish(kernel: Kernel, address: int) -> None:
    interrupt = None
    while True:
        try:
            while not kernel(address):
                time.sleep(0)
            break
        except BaseException as error:  # Ctrl-C; helpers may still be at work on memory that would be freed
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _work_together(kernel: Kernel, job: np.ndarray, address: int, helpers: int) -> None:
    """Have so many more threads look for chunks; one that comes too late finds none. Some chunks may be left."""
    if (openmp := _openmp()) is not None:
        openmp(kernel, address, helpers + 1, 0)
        return
    try:
        for _ in range(helpers):
            _pool().submit(_help, kernel, job)
    except RuntimeError:  # at the end of the interpreter no pool takes work any more
        pass


def _help(kernel: Kernel, job: np.ndarray) -> None:
    kernel(job.ctypes.data)


@cache
def _openmp() -> Any:
    """What compilers make of a parallel region, in the OpenMP that torch was linked with: it runs a function on so
    many threads, this one among them."""
    if _is_forked:
        return None
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):  # not Linux, or another OpenMP
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads, which it starts when they are needed."""
    return ThreadPoolExecutor(os.cpu_count(), "skywork-hf-cpu-kernel")


def _after_fork() -> None:
    """In a child, where no thread lives on."""
    global _is_forked, _compiling
    _is_forked, _compiling = True, threading.Lock()
    _openmp.cache_clear()
    _pool.cache_clear()


_is_forked = False
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def compile_for(dtypes: Iterable[torch.dtype]) -> None:
    """Have the kernels for weights of these dtypes ready before they are needed."""
    for dtype in dtypes:
        _compiled(dtype)


def _compiled(dtype: torch.dtype) -> Kernel:
    """The kernel for weights of a dtype, from numba's cache on the disk where that can be."""
    with _compiling:
        if dtype not in _kernels:
            notice = threading.Timer(
                _SECONDS_TO_COMPILE,
                lambda: logger.warning_once("Compiling CPU kernels, which takes some seconds once ..."),
            )
            notice.start()
            signature = types.boolean(types.int64)
            try:
                compiled = cfunc(signature, cache=True)(_SOURCES[dtype])
            except Exception:  # no folder for a cache, a full one, or a damaged file in it
                compiled = cfunc(signature)(_SOURCES[dtype])
            finally:
                notice.cancel()
            _kernels[dtype] = compiled.ctypes
        return _kernels[dtype]
