"""float16 that overflows in experts is said once, without a wait of its own; nothing else is."""

from __future__ import annotations

import pytest
import torch
from simulated_device import SimulatedDevices
from tiny import LAYOUTS, tiny_dense_config, tiny_moe_config, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from skywork_hf import SkyworkMoeForCausalLM, overflow, plan_device_map
from skywork_hf.modeling_skywork_moe import SkyworkMoeExperts


@pytest.fixture
def said(caplog):
    """How often it was said, by a function."""
    overflow.logger.warning_once.cache_clear()
    overflow.logger.addHandler(caplog.handler)  # and what propagates comes a second time
    yield lambda: len({id(record) for record in caplog.records if "float16 overflowed" in record.message})
    overflow.logger.removeHandler(caplog.handler)


def model_of(dtype: torch.dtype = torch.float16, layout: str = "modular", factor: float = 1.0):
    torch.manual_seed(0)
    model = SkyworkMoeForCausalLM(tiny_moe_config(experts_layout=layout, experts_implementation="eager"))
    return enlarge(model.eval().to(dtype), factor)


@torch.no_grad()
def enlarge(model, factor: float):
    """Experts whose intermediate values are `factor` squared times as large."""
    for name, parameter in model.named_parameters():
        if name.endswith(("w1.weight", "w3.weight", "gate_up_proj")):
            parameter.mul_(factor)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_said_once(layout, said):
    model = model_of(layout=layout, factor=3000)
    with torch.no_grad():
        for _ in range(3):
            assert not model(tokens()).logits.isfinite().all()
            assert said() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_is_what_begins_later(layout, said, monkeypatch):
    """Where the host waits in each forward, in the next one; else when the flag is looked at again."""
    monkeypatch.setattr(overflow, "_EVERY", 4)
    model = model_of(layout=layout)
    with torch.no_grad():
        model(tokens())
        assert said() == 0
        enlarge(model, 3000)
        model(tokens())
        enlarge(model, 1 / 3000)
        model(tokens())
        assert said() == (layout == "modular")
        for _ in range(3):
            model(tokens())
    assert said() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_do_not_even_look(dtype, layout, said, monkeypatch):
    monkeypatch.setattr(overflow, "_broken", lambda _: pytest.fail("looked"))
    with torch.no_grad():
        model_of(dtype, layout, 3000)(tokens())
    assert said() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_said_of_training_autocast_or_what_came_in_infinite(layout, said):
    wrong = model_of(layout=layout, factor=3000)
    wrong(tokens())  # with gradients
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        model_of(torch.float32, layout, 3000)(tokens())
        wrong(tokens())
    right = model_of(layout=layout)
    with torch.no_grad():
        right.model.embed_tokens.weight.fill_(torch.inf)
        assert not right(tokens()).logits.isfinite().all()
    assert said() == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_look_tells_what_is_not_finite_in_few_kernels(device):
    rows = torch.zeros(6, 3, dtype=torch.float16, device=device)
    rows[0, 1], rows[1, 2], rows[2, 0] = torch.inf, -torch.inf, torch.nan
    rows[3, 0], rows[4, 0] = 65504, 2**-24
    with Kernels() as kernels:
        broken = overflow._broken(rows)
    assert broken.tolist() == [True, True, True, False, False, False]
    assert kernels.started == 2


class Kernels(TorchDispatchMode):
    started = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.started += 1
        return func(*args, **(kwargs or {}))


def test_it_costs_a_wait_in_the_first_forward_only():
    config = tiny_moe_config()
    with SimulatedDevices() as simulated, torch.no_grad():
        experts = SkyworkMoeExperts(config).half().to("lazy:0")
        inputs = torch.randn(5, config.hidden_size, dtype=torch.float16).to("lazy:0")
        chosen, weights = torch.zeros(5, 2, dtype=torch.int64).to("lazy:0"), torch.ones(5, 2).to("lazy:0")
        waits = []
        for _ in range(3):
            simulated.reset()
            experts.overflow.look(inputs, experts(inputs, chosen, weights))
            waits.append(simulated.host_syncs)
    assert waits == [2, 1, 1]


@pytest.mark.parametrize(
    ("card", "dtype", "line"),
    [
        ("t4", None, "0: no bfloat16 unit, so it is slower there than the bound says; float16 is faster there, but"),
        ("v100", None, "0: no bfloat16 unit"),
        ("p40", None, "0: no bfloat16 unit"),
        ("t4", "fp16", "float16: experts may compute values beyond 65,504"),
        ("rtx3090", "fp16", "float16: experts may compute values beyond 65,504"),
        ("rtx3090", None, None),
        ("t4", "fp32", None),
    ],
)
def test_a_plan_says_what_16_bit_risks_on_a_card(card, dtype, line):
    plan = plan_device_map(tiny_moe_config(), {0: card}, dtype, context_tokens=32)
    assert (line or "no bfloat16 unit") in str(plan) if line else "bfloat16 unit" not in str(plan)
    assert ("65,504" in str(plan)) == (line is not None)
    dense = str(plan_device_map(tiny_dense_config(), {0: card}, dtype, context_tokens=32))
    assert "65,504" not in dense
    assert ("no bfloat16 unit" in dense) == (line is not None and dtype is None)
