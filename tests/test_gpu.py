"""Models on GPUs that are there. The same is tested without one: on simulated devices and in Triton's interpreter."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from tiny import tiny_dense_config, tiny_moe_config, tokens
from transformers import AutoModelForCausalLM, StaticCache

from skywork_hf import SkyworkForCausalLM, SkyworkFp8Config, SkyworkInt8Config, SkyworkMoeForCausalLM
from skywork_hf.compat import CACHE

CONFIGS = {"int8": SkyworkInt8Config, "fp8": SkyworkFp8Config, "bf16": lambda: None}
# Of vectors that the kernels read in whole, and of ones that end within a block.
SHAPES = {
    "whole": {"hidden_size": 256, "intermediate_size": 512},
    "odd": {"hidden_size": 72, "intermediate_size": 136},
}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
kinds = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def saved(folder: Any, shape: str = "whole", is_dense: bool = False) -> Any:
    model = (
        SkyworkForCausalLM(tiny_dense_config(**SHAPES[shape]))
        if is_dense
        else SkyworkMoeForCausalLM(tiny_moe_config(**SHAPES[shape], num_experts=[8]))
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Any, kind: str, device_map: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device_map, quantization_config=CONFIGS[kind]()
    )


def spread(*places: int | str) -> dict[str, Any]:
    """A device map that deals the experts to devices in turn; all else is on the first."""
    named = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), places[0])
    for layer in (f"model.layers.{number}" for number in range(2)):
        parts = ("self_attn", "input_layernorm", "post_attention_layernorm", "block_sparse_moe.gate")
        named |= {f"{layer}.{part}": places[0] for part in parts}
        experts = f"{layer}.block_sparse_moe.experts"
        named |= {f"{experts}.{number}": places[number % len(places)] for number in range(8)}
    return named


def decoded(model: Any, ids: torch.Tensor, at_once: int) -> torch.Tensor:
    """The logits of all tokens, read so many at a time."""
    logits, past = [], {}
    for part in ids.split(at_once, dim=1):
        outputs = model(part, **past)
        past = {CACHE: getattr(outputs, CACHE)}
        logits.append(outputs.logits.float().cpu())
    return torch.cat(logits, dim=1)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what activations in FP8 and int8 lose over two layers."""
    assert got.isfinite().all()
    assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.gpu  # without one: test_experts_anywhere_are_the_reference_path_s, test_partial_sums_of_experts_add_up
@pytest.mark.parametrize("at_once", [1, 3, 8, 24])
@pytest.mark.parametrize("shape", SHAPES)
@kinds
def test_any_number_of_tokens_computes_what_a_cpu_does(kind, shape, at_once, tmp_path):
    folder, ids = saved(tmp_path, shape), tokens(2, 24)  # so that both sides of 4, 16 and 17 rows are met
    expected = decoded(load(folder, kind, "cpu"), ids, 24)
    assert_close(decoded(load(folder, kind, 0), ids.cuda(), at_once), expected)


@pytest.mark.gpu  # without one: test_experts_anywhere_are_the_reference_path_s
@kinds
def test_experts_beside_a_gpu_compute_what_a_cpu_does(kind, tmp_path):
    folder, ids = saved(tmp_path), tokens(1, 8)
    expected = decoded(load(folder, kind, "cpu"), ids, 8)
    assert_close(decoded(load(folder, kind, spread(0, "cpu")), ids.cuda(), 1), expected)


@pytest.mark.gpu  # without one: test_launches_bytes_and_waits_of_a_layer
@kinds
def test_the_host_never_waits_where_all_experts_are_on_one_gpu(kind, tmp_path):
    model, ids = load(saved(tmp_path), kind, 0), tokens(1, 6).cuda()
    held = {CACHE: StaticCache(config=model.config, max_cache_len=8)}
    for token in ids[:, :3].split(1, dim=1):  # what is made once
        model(token, **held)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = [model(token, **held).logits for token in ids[:, 3:].split(1, dim=1)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(outputs).isfinite().all()


@pytest.mark.gpu  # without one: test_experts_anywhere_are_the_reference_path_s
@TWO_GPUS
@kinds
def test_two_gpus_compute_the_same_with_peer_access_and_without(kind, tmp_path):
    folder, ids = saved(tmp_path), tokens(1, 8)
    expected = decoded(load(folder, kind, "cpu"), ids, 8)
    model = load(folder, kind, spread(0, 1))
    first = decoded(model, ids.cuda(), 1)  # torch turns it on with the first copy, where it can be
    assert_close(first, expected)
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("these have no peer access, so that the other half is nothing")
    set_peer_access("Disable")
    try:
        assert torch.equal(decoded(model, ids.cuda(), 1), first)
    finally:
        set_peer_access("Enable")


def set_peer_access(verb: str) -> None:
    """As torch has no way to: by the CUDA runtime that it has loaded."""
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    for here, other in ((0, 1), (1, 0)):
        with torch.cuda.device(here):
            torch.cuda.synchronize()
            flags = (0,) if verb == "Enable" else ()
            code = getattr(runtime, f"cudaDevice{verb}PeerAccess")(other, *flags)
            runtime.cudaGetLastError()  # forgets it
            assert code in (0, 704, 705)  # done, was on, was off


@pytest.mark.parametrize(
    ("is_dense", "device"),
    [(True, "cpu"), *(pytest.param(dense, 0, marks=pytest.mark.gpu) for dense in (True, False))],
)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_static_cache_decodes_compiled_whole(kind, is_dense, device, tmp_path):
    """On a CPU the dense model; there experts are asked for on the host. Without a GPU, of these:
    test_torch_compile_takes_them_whole."""
    torch.compiler.reset()
    model = load(saved(tmp_path, is_dense=is_dense), kind, device)
    ids = tokens(1, 8).to(model.device)
    options = {"mode": "reduce-overhead"} if model.device.type == "cuda" else {"backend": "eager"}
    compiled = torch.compile(model, fullgraph=True, **options)
    held = [{CACHE: StaticCache(config=model.config, max_cache_len=16)} for _ in range(2)]
    for past in held:
        model(ids[:, :4], **past)
    for token in ids[:, 4:].split(1, dim=1):
        expected, got = (run(token, **past).logits.float() for run, past in zip((model, compiled), held, strict=True))
        assert_close(got, expected)
