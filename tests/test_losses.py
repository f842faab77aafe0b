"""Losses with nothing to predict, and rows beyond the context: no NaN, and a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from simulated_device import SimulatedDevices
from tiny import tiny_dense_config, tiny_moe_config, tokens
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pad_sequence
from transformers.testing_utils import CaptureLogger
from transformers.utils.logging import warning_once

from skywork_hf import SkyworkForCausalLM, SkyworkForSequenceClassification, SkyworkMoeForCausalLM
from skywork_hf.losses import logger

FAMILIES = {
    "dense": lambda **changes: SkyworkForCausalLM(tiny_dense_config(**changes)),
    "modular": lambda **changes: SkyworkMoeForCausalLM(tiny_moe_config(**changes)),
    "fused": lambda **changes: SkyworkMoeForCausalLM(tiny_moe_config(experts_layout="fused", **changes)),
}


@pytest.fixture(autouse=True)
def _as_if_nothing_was_said() -> None:
    warning_once.cache_clear()


def masked(ids: torch.Tensor, but_first: bool = False) -> torch.Tensor:
    labels = torch.full_like(ids, -100)
    if but_first:
        labels[:, 0] = ids[:, 0]  # which no token predicts
    return labels


NOTHING: dict[str, Any] = {
    "all masked": lambda ids: {"labels": masked(ids)},
    "all but what is no target": lambda ids: {"labels": masked(ids, but_first=True)},
    "shifted": lambda ids: {"labels": ids, "shift_labels": masked(ids)},
    "a step's count": lambda ids: {"labels": masked(ids), "num_items_in_batch": torch.tensor(0)},
    "a step's count as a number": lambda ids: {"labels": masked(ids), "num_items_in_batch": 0},
}


@pytest.mark.parametrize("batch", NOTHING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_a_target_has_a_loss_of_0_and_no_nan_in_its_gradients(family, batch):
    model, ids = FAMILIES[family](), tokens()
    with CaptureLogger(logger) as said:
        loss = model(input_ids=ids, **NOTHING[batch](ids)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None
    assert "A step has no token to predict" in said.out


def test_nor_has_it_with_the_auxiliary_loss():
    model, ids = FAMILIES["modular"](), tokens()
    nothing = {"labels": masked(ids), "output_router_logits": True}
    whole = model(input_ids=ids, **nothing)
    torch.testing.assert_close(whole.loss, model.config.router_aux_loss_coef * whole.aux_loss)
    step = model(input_ids=ids, **nothing, num_items_in_batch=torch.tensor(0)).loss
    assert step.item() == 0  # its share of a step without targets
    step.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("items", [None, 7, torch.tensor(30)])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_losses_are_the_definitions(family, items):
    model, ids = FAMILIES[family](), tokens()
    labels = ids.clone()
    labels[0, :6] = -100
    with CaptureLogger(logger) as said:
        output = model(input_ids=ids, labels=labels, num_items_in_batch=items)
    predicted, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(predicted, targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(output.loss, total / (targets.ne(-100).sum() if items is None else items))
    assert not said.out


def test_a_compiled_step_of_the_fused_layout_is_whole():
    model, ids = FAMILIES["fused"](), tokens()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    for labels in (ids, masked(ids)):
        wanted = model(input_ids=ids, labels=labels, use_cache=False).loss
        torch.testing.assert_close(step(input_ids=ids, labels=labels, use_cache=False).loss, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_beyond_the_context_are_spoken_of_once(family):
    model = FAMILIES[family](max_position_embeddings=8)
    with CaptureLogger(logger) as said:
        for length in (8, 9, 12):
            ids = tokens(length=length)
            model(input_ids=ids, labels=ids)
    assert said.out.count("Rows are longer than max_position_embeddings=8") == 1
    assert "unless they are packed" in said.out


def test_other_heads_and_losses_of_users_are_left_alone():
    assert SkyworkForSequenceClassification(tiny_dense_config()).loss_function.__name__ == (
        "ForSequenceClassificationLoss"
    )
    model, ids = FAMILIES["dense"](), tokens()
    model.loss_function = lambda logits, **kwargs: logits.sum()
    output = model(input_ids=ids, labels=masked(ids))
    assert torch.equal(output.loss, output.logits.sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_another_label_may_be_the_one_to_ignore(family):
    model, ids = FAMILIES[family](), tokens()
    labels = ids.clone()
    labels[:, :5] = 0
    output = model(input_ids=ids, labels=labels, ignore_index=0)
    predicted, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(output.loss, F.cross_entropy(predicted, targets, ignore_index=0))


def row_by_row(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    """The mean over all targets of rows that are each alone."""
    losses = [model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    return torch.stack(losses).sum() / sum(len(row) - 1 for row in rows)


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """As a collator for language models pads."""
    pad = {value: pad_sequence(rows, True, value, padding_side=side) for value in (0, -100)}
    return {"input_ids": pad[0], "labels": pad[-100], "attention_mask": pad[-100].ne(-100).long()}


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_is_predicted_from_padding(family, side, counted):
    model, rows = FAMILIES[family](), [tokens(1, length)[0] for length in (4, 9, 6)]
    batch = padded(rows, side)
    # As the Trainer counts, which knows nothing of padding.
    items = {"num_items_in_batch": batch["labels"][:, 1:].ne(-100).sum()} if counted else {}
    torch.testing.assert_close(model(**batch, **items).loss, row_by_row(model, rows))
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, row_by_row(model, rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_from_another_text_in_packed_rows(family):
    model, rows = FAMILIES[family](), [tokens(1, length)[0] for length in (4, 1, 9)]
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
    torch.testing.assert_close(packed, row_by_row(model, [rows[0], rows[2]]))


def test_the_end_of_a_text_that_is_padding_too_is_still_learnt():
    model, ids = FAMILIES["dense"](), tokens()
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    labels = ids.clone()
    labels[:, -1] = -100
    predicted = model(input_ids=ids, attention_mask=mask).logits[:, :-2].flatten(0, 1)
    wanted = F.cross_entropy(predicted, ids[:, 1:-1].flatten())
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, labels=labels).loss, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_given_twice_or_beyond_its_own_are_refused_as_by_any_function(family):
    model, ids = FAMILIES[family](), tokens()
    for args, kwargs in (((ids,), {"input_ids": ids}), ((ids, *[None] * 20), {})):
        for labels in ({}, {"labels": ids}):
            with pytest.raises(TypeError):
                model(*args, **kwargs, **labels)


@pytest.mark.parametrize(("family", "waits"), [("dense", 0), ("modular", 2)])
def test_the_host_waits_for_no_warning(family, waits):
    with SimulatedDevices() as simulated:
        model, ids = FAMILIES[family]().to("lazy:0"), tokens().to("lazy:0")
        simulated.reset()
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(7).to("lazy:0")).loss.backward()
        assert simulated.host_syncs == waits  # one for each MoE layer's experts


def test_tensors_without_values_have_a_loss_too():
    ids = tokens()
    model = FAMILIES["dense"]()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, kwargs={"input_ids": row[None], "labels": row[None]}).loss

    of_each = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    model(input_ids=ids[:1], labels=ids[:1]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(of_each[name][0], parameter.grad, msg=name)
    assert model.to("meta")(input_ids=ids.to("meta"), labels=ids.to("meta")).loss.shape == ()
