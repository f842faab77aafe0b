"""The simulated accelerators: operations, copies and waits, then models that transformers and accelerate spread."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevices, SimulatedTensor
from tiny import tiny_dense_config, tiny_moe_config, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from skywork_hf import SkyworkForCausalLM, SkyworkInt8Config, SkyworkMoeForCausalLM

CPU, FIRST, SECOND = (torch.device(name) for name in ("cpu", "lazy:0", "lazy:1"))
DEVICE_MAP = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "lazy:0") | dict.fromkeys(
    ("model.layers.1", "model.norm", "lm_head"), "lazy:1"
)
PAIRS = {
    "mm": lambda x, y: x @ y,
    "add": torch.add,
    "in place": lambda x, y: x.mul_(y),
    "out": lambda x, y: torch.add(x, x, out=y),
    "cat": lambda x, y: torch.cat([x, y]),
    "index": lambda x, y: x[y.argmax(0)] if x.device == CPU else x.index_select(0, y.argmax(0)),
    "where": lambda x, y: torch.where(x > 0, x, y),
}
OPERATIONS = {
    "view and in place": lambda x: x.view(2, 8).add_(1)[0].mul_(2),
    "view of a base": lambda x: (x.T[1:].zero_(), x)[1],
    "reshaped in place": lambda x: x.unsqueeze_(0).transpose_(1, 2).squeeze_(0).t_().add_(1)[1:],
    "vector by matrix": lambda x: x[0] @ x,
    "out": lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
    "slices": lambda x: x[1:, ::2].contiguous(),
    "assigned": lambda x: x.index_put_((torch.tensor([0, 2], device=x.device),), x[1].clone()),
    "advanced": lambda x: x[torch.tensor([2, 0])],
    "masked": lambda x: x[x > 0],
    "filled": lambda x: x.masked_fill(x > 0, -1.0),
    "CPU scalar": lambda x: x * torch.tensor(2.0),
    "many outputs": lambda x: torch.cat(x.topk(2)[:1] + x.split(2, dim=-1), dim=-1),
    "made there": lambda x: torch.arange(4, device=x.device) + x.new_ones(4) + torch.zeros_like(x),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 2, 2, 4)] * 3, is_causal=True),
    "bfloat16": lambda x: F.linear(x.bfloat16(), x.bfloat16()),
    "float8": lambda x: x.to(torch.float8_e4m3fn).view(torch.uint8).view(torch.float8_e4m3fn).float(),
    "int8 matmul": lambda x: torch._weight_int8pack_mm(
        x.repeat(4, 16).bfloat16(),
        x.repeat(4, 16).to(torch.int8),
        torch.ones(16, dtype=torch.bfloat16, device=x.device),
    ),
    "data": lambda x: torch.nn.Parameter(x).data,
}
WAITS = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy_": lambda x: torch.empty(4, 4).copy_(x),
    "nonzero": torch.nonzero,
    "mask": lambda x: x[x > 0],
    "assigned at a mask": lambda x: x.__setitem__(x > 0, x[x > 0]),
    "equal": lambda x: torch.equal(x, x),
    "if": lambda x: bool((x > 0).any()),
}
NO_WAITS = {
    "non-blocking": lambda x: x.to("cpu", non_blocking=True),
    "to another device": lambda x: x.to("lazy:1"),
    "filled at a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "index": lambda x: x[x.argmax(0)],
    "to meta": lambda x: x.to("meta"),
}


@pytest.fixture
def simulated():
    with SimulatedDevices() as devices:
        yield devices


def square() -> torch.Tensor:
    return torch.arange(16.0).sub(7.5).view(4, 4)


# --- operations


@pytest.mark.parametrize("operation", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize(("first", "second"), [("lazy:0", "lazy:1"), ("lazy:0", "cpu"), ("cpu", "lazy:0")])
def test_an_operation_on_two_devices_raises(simulated, operation, first, second):
    with pytest.raises(RuntimeError, match="same device"):
        operation(square().to(first), square().to(second))


def test_a_scalar_on_the_cpu_cannot_take_a_device_result(simulated):
    with pytest.raises(RuntimeError, match="same device"):
        torch.tensor(1.0).add_(torch.tensor(1.0, device="lazy:0"))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_gives_what_the_cpu_gives_and_stays_there(simulated, operation, inference):
    with torch.inference_mode(inference):
        result = operation(square().to("lazy:1"))
        assert result.device == SECOND
        torch.testing.assert_close(result.cpu(), operation(square()))


def test_in_place_returns_the_same_tensor_and_views_share_memory(simulated):
    tensor = square().to("lazy:0")
    row = tensor[0]
    assert row.add_(100) is row
    assert tensor[0].tolist() == square()[0].add(100).tolist()
    assert row.data_ptr() == tensor.data_ptr()


def test_backward_crosses_devices(simulated):
    weight = torch.nn.Parameter(square().to("lazy:0"))
    (torch.sin(weight @ weight).to("lazy:1") * torch.ones(4, device="lazy:1")).sum().backward()
    plain = square().requires_grad_()
    torch.sin(plain @ plain).sum().backward()
    assert isinstance(weight, torch.nn.Parameter)
    assert weight.grad.device == FIRST
    torch.testing.assert_close(weight.grad.cpu(), plain.grad)
    assert Counter((copy.source, copy.target) for copy in simulated.copies)[SECOND, FIRST] == 1


def test_a_module_moves_between_devices(simulated):
    linear = torch.nn.Linear(4, 3)
    expected = linear(square())
    for device in ("lazy:0", "lazy:1", "cpu"):
        torch.testing.assert_close(linear.to(device)(square().to(device)).cpu(), expected)
    assert type(linear.weight) is torch.nn.Parameter


def test_a_simulated_tensor_works_only_inside():
    with SimulatedDevices():
        tensor = torch.ones(2, device="lazy:0")
    with pytest.raises(RuntimeError, match="outside"):
        tensor + 1


# --- copies and waits


def test_copies_are_recorded(simulated):
    there = torch.ones(3, 2).to("lazy:0", torch.bfloat16, non_blocking=True)
    there.to("lazy:0").float().clone()
    torch.empty(4, 3, 2, dtype=torch.bfloat16, device="lazy:1").copy_(there)
    there.cpu()
    assert simulated.copies == [
        (CPU, FIRST, 12, True),
        (FIRST, SECOND, 48, False),
        (FIRST, CPU, 12, False),
    ]
    simulated.reset()
    assert (simulated.copies, simulated.host_syncs) == ([], 0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("action", WAITS.values(), ids=WAITS)
def test_the_host_waits(simulated, action, inference):
    with torch.inference_mode(inference):
        tensor = square().to("lazy:0")
        action(tensor)
    assert simulated.host_syncs == (2 if action is WAITS["assigned at a mask"] else 1)


@pytest.mark.parametrize("action", NO_WAITS.values(), ids=NO_WAITS)
def test_the_host_does_not_wait(simulated, action):
    action(square().to("lazy:0"))
    assert simulated.host_syncs == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_a_non_blocking_copy_is_wrong_until_the_host_waits_for_its_source(simulated, dtype):
    values = square().to(dtype)
    early = values.to("lazy:0").to("cpu", non_blocking=True)
    assert not any(
        one == true
        for row, wanted in zip(early.tolist(), values.tolist(), strict=True)
        for one, true in zip(row, wanted, strict=True)
    )
    torch.ones(1, device="lazy:1").item()
    for touch in (lambda: early.view(-1) == 0, lambda: early.to("lazy:1"), lambda: early.zero_()):
        with pytest.raises(RuntimeError, match="before the host has waited"):
            touch()
    torch.ones(1, device="lazy:0").item()
    assert early.tolist() == values.tolist()


def test_non_blocking_copies_into_one_buffer_arrive_together(simulated):
    buffer, source = torch.zeros(4, 4), square().to("lazy:0")
    for row in range(4):
        buffer[row].copy_(source[row], non_blocking=True)
    source.zero_()  # queued after the copies
    simulated.synchronize()
    assert buffer.tolist() == square().tolist()
    assert simulated.host_syncs == 1


# --- streams


def elapsed(simulated: SimulatedDevices, program: Any) -> float:
    """The time of a program on tensors of 64 bytes, one on each device, in reads of one of them."""
    here, there, at_home = (square().to(device) for device in (FIRST, SECOND, CPU))
    simulated.reset()
    program(here, there, at_home)
    return simulated.elapsed / 64


@pytest.mark.parametrize(
    ("program", "takes"),
    [
        (lambda here, there, _: here.exp(), 1),
        (lambda here, there, _: here @ here, 2),  # it reads both
        (lambda here, there, _: here.t()[1:].view(3, 4), 0),  # and this nothing
        (lambda here, there, _: (here.exp(), here.exp()), 2),
        (lambda here, there, _: (here.exp(), there.exp()), 1),
        (lambda here, there, at_home: (here.exp(), there.exp(), at_home.exp()), 1),
        (lambda here, there, at_home: (at_home.exp(), here.exp()), 2),  # the host asks for it afterwards
        (lambda here, there, _: (here.exp(), here[0, 0].item(), there.exp()), 2 + 1 / 16),  # of one number
        (lambda here, there, _: (here.exp().to(SECOND), there.exp()), 3),
        (lambda here, there, _: (there.exp(), here.to(SECOND), here.exp()), 3),  # both ends wait, and are occupied
        (lambda here, there, at_home: (here.to("cpu", non_blocking=True), at_home.exp()), 1),
        (lambda here, there, at_home: (here.to("cpu"), at_home.exp()), 2),
        (lambda here, there, at_home: (here.exp(), at_home.to(FIRST), at_home.exp()), 3),
        (lambda here, there, at_home: (here.exp(), at_home.to(FIRST, non_blocking=True), at_home.exp()), 2),
    ],
)
def test_each_device_does_one_thing_after_the_other_and_copies_occupy_both_ends(simulated, program, takes):
    assert elapsed(simulated, program) == takes


# --- models


def load(path: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


def output_devices(model: torch.nn.Module) -> dict[str, torch.device]:
    """Filled while the model runs: the device of what each part of it returned."""
    devices: dict[str, torch.device] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: devices.update({name: getattr(output, "device", None)})

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    return devices


@pytest.fixture
def dense(tmp_path):
    SkyworkForCausalLM(tiny_dense_config()).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("layer", ["lazy:1", "cpu", "disk"])
def test_a_spread_dense_model_gives_what_the_cpu_gives(dense, layer):
    plain, ids, greedy = load(dense), tokens(), {"max_new_tokens": 3, "do_sample": False}
    expected, continued = plain(ids).logits, plain.generate(ids, **greedy).tolist()
    with SimulatedDevices() as simulated:
        model = load(dense, device_map=DEVICE_MAP | {"model.layers.1": layer})
        assert {type(parameter) for parameter in model.model.layers[0].parameters()} == {SimulatedTensor}
        assert {copy.source for copy in simulated.copies} == {CPU}
        devices = output_devices(model)
        logits = model(ids.to("lazy:0")).logits
        assert simulated.host_syncs == 0
        assert devices["model.layers.0.mlp"] == FIRST
        assert devices["lm_head"] == devices["model.norm"] == SECOND
        # What is offloaded runs on the "main device", one of the two: accelerate takes any, by the hash of its name.
        assert devices["model.layers.1.mlp"] in ({SECOND} if layer == "lazy:1" else {FIRST, SECOND})
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-5, atol=1e-5)
        assert model.generate(ids.to("lazy:0"), **greedy).tolist() == continued


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_layer_is_copied_at_each_forward(dense, simulated, place):
    model = load(dense, device_map=DEVICE_MAP | {"model.layers.1": place})
    layer = [parameter for name, parameter in model.named_parameters() if name.startswith("model.layers.1.")]
    assert {parameter.device.type for parameter in layer} == {"meta"}
    ids = tokens().to("lazy:0")
    for _ in range(2):
        simulated.reset()
        model(ids)
        uploads = Counter(copy.nbytes for copy in simulated.copies if copy.source == CPU)
        assert not Counter(parameter.nbytes for parameter in layer) - uploads


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_spread_model_trains(tmp_path, moe):
    model = SkyworkMoeForCausalLM(tiny_moe_config()) if moe else SkyworkForCausalLM(tiny_dense_config())
    model.save_pretrained(tmp_path)
    ids, options = tokens(), {"output_router_logits": True} if moe else {}
    model(ids, labels=ids, **options).loss.backward()
    with SimulatedDevices():
        spread = load(tmp_path, device_map=DEVICE_MAP)
        spread(ids.to("lazy:0"), labels=ids.to("lazy:0"), **options).loss.backward()
        for name, parameter in spread.named_parameters():
            assert parameter.grad.device == parameter.device
            wanted = model.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad.cpu(), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"quantization_config": SkyworkInt8Config()}], ids=["float32", "int8"])
@pytest.mark.parametrize("layer", ["lazy:1", "cpu"])
def test_a_spread_moe_model_gives_what_the_cpu_gives(tmp_path, layer, options):
    SkyworkMoeForCausalLM(tiny_moe_config(hidden_size=64)).save_pretrained(tmp_path)
    ids = tokens()
    expected = load(tmp_path, **options)(ids).logits
    with SimulatedDevices() as simulated:
        model = load(tmp_path, device_map=DEVICE_MAP | {"model.layers.1": layer}, **options)
        devices = output_devices(model)
        simulated.reset()
        logits = model(ids.to("lazy:0")).logits
        assert simulated.host_syncs == len(model.model.layers)  # each asks which experts were chosen
        assert devices["model.layers.0.block_sparse_moe"] == FIRST
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)
