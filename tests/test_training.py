"""The adaptive auxiliary loss, and what is counted of the gates.

This file runs as a program too: two processes, forked once all is imported, train together.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny_dense_config, tiny_moe_config
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.testing_utils import CaptureLogger
from transformers.trainer_callback import TrainerState
from transformers.utils import ModelOutput

import skywork_hf
from skywork_hf import AdaptiveAuxLossCallback, SkyworkForCausalLM, SkyworkInt8Config, SkyworkMoeForCausalLM
from skywork_hf.modeling_skywork_moe import load_balancing_loss, routing_probabilities
from skywork_hf.training import aux_loss
from skywork_hf.training.aux_loss import adapted, logger
from skywork_hf.training.router_load import RouterLoad, balanced_drop_rate, load_of_step, router_sums

VOCABULARY = 67


@pytest.fixture(autouse=True)
def pictures(monkeypatch) -> list[Path]:
    """Where pictures would be: drawing takes longer than the trainings here. `test_examples.py` draws."""
    asked: list[Path] = []
    monkeypatch.setattr(aux_loss, "draw_router", lambda *given: asked.append(given[-1]))
    return asked


def model_of(**changes: Any) -> SkyworkMoeForCausalLM:
    torch.manual_seed(0)
    return SkyworkMoeForCausalLM(tiny_moe_config(**changes))


def router_load(logits: Any, config: Any, mask: Any = None) -> RouterLoad:
    return load_of_step(router_sums(logits, config, mask), config)


def rows(count: int, length: int = 12, seed: int = 0, low: int = 3, high: int = VOCABULARY) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def batch_of(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "labels")}


class InOrder(IterableDataset):
    """Rows that no sampler shuffles."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def trainer_of(model: Any, folder: Path, data: Any, callbacks: Any = None, **arguments: Any) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    callbacks = [AdaptiveAuxLossCallback()] if callbacks is None else callbacks
    return Trainer(
        model=model, args=TrainingArguments(**(defaults | arguments)), train_dataset=data, callbacks=callbacks
    )


# --- what is counted


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(2, 6),
    tokens=st.integers(1, 12),
    seed=st.integers(0, 99),
    factor=st.sampled_from([0.5, 1.0, 1.25]),
    data=st.data(),
)
def test_counts_are_those_of_a_plain_loop(experts, tokens, seed, factor, data):
    top_k = data.draw(st.integers(1, experts))
    config = tiny_moe_config(num_experts=experts, num_experts_per_tok=top_k, router_capacity_factor=factor)
    torch.manual_seed(seed)
    logits = tuple(torch.randn(tokens, experts) for _ in range(2))
    mask = torch.tensor([[True, *data.draw(st.lists(st.booleans(), min_size=tokens - 1, max_size=tokens - 1))]])
    load = router_load(logits, config, mask)
    for layer, of_layer in enumerate(logits):
        chosen, entropy, first = [0] * experts, 0.0, 0.0
        for kept, row in zip(mask[0], of_layer, strict=True):
            if not kept:
                continue
            chances = routing_probabilities(row.unsqueeze(0), config)[0]
            order = sorted(range(experts), key=lambda expert: -chances[expert].item())
            for expert in order[:top_k]:
                chosen[expert] += 1
            entropy -= sum(chance * chance.log() for chance in chances).item()
            first += (chances[order[0]] / chances[order[1]]).item()
        kept = int(mask.sum())
        capacity = -(-factor * kept * top_k // experts)
        dropped = sum(max(0, count - capacity) for count in chosen)
        statistics = {name: values[layer].item() for name, values in load.statistics().items()}
        assert statistics["drop_rate"] == pytest.approx(dropped / (kept * top_k))
        assert statistics["max_load"] == pytest.approx(max(chosen) * experts / (kept * top_k))
        assert statistics["min_load"] == pytest.approx(min(chosen) * experts / (kept * top_k))
        assert statistics["entropy"] == pytest.approx(entropy / kept, rel=1e-4)
        assert statistics["max1_max2"] == pytest.approx(first / kept, rel=1e-4)
        assert ("max2_max3" in statistics) == (experts > 2)
        assert load.sorted_probabilities[layer].sum().item() == pytest.approx(1)


def test_loads_add_up():
    config = tiny_moe_config()
    halves = [(torch.randn(6, 4), torch.randn(6, 4)) for _ in range(2)]
    together = tuple(torch.cat(layer) for layer in zip(*halves, strict=True))
    added = router_load(halves[0], config) + router_load(halves[1], config)
    assert added.relative_loads.equal(router_load(together, config).relative_loads)


def test_a_gate_that_is_certain_gives_no_infinity():
    config = tiny_moe_config(moe_use_logits_norm=False)
    load = router_load((torch.tensor([[900.0, 0, -900, 0]]),), config)
    assert all(values.isfinite().all() for values in load.statistics().values())
    assert router_load((torch.zeros(2, 4),), config, torch.zeros(1, 2)).drop_rates.tolist() == [0.0]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor"),
    [(256, 16, 2, 1.0), (4096, 16, 2, 1.0), (100, 8, 3, 1.1), (7, 4, 1, 0.5), (50, 2, 2, 1.0)],
)
def test_the_drop_rate_of_a_balanced_gate_is_that_of_random_choices(tokens, experts, top_k, factor):
    config = tiny_moe_config(
        num_experts=[experts], num_experts_per_tok=top_k, router_capacity_factor=factor, moe_use_logits_norm=False
    )
    generator, steps = torch.Generator().manual_seed(0), min(1000, 60_000 // tokens)
    logits = tuple(torch.randn(tokens, experts, generator=generator) for _ in range(steps))
    rates = router_load(logits, config).drop_rates
    error = rates.std(correction=0).item() / steps**0.5
    assert balanced_drop_rate(tokens, config) == pytest.approx(rates.mean().item(), abs=4 * error + 1e-12)


# --- the coefficients


@settings(max_examples=50, deadline=None)
@given(
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=60),
    first=st.floats(0, 0.02),
    beta=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_coefficients_follow_the_closed_form(rates, first, beta):
    config = tiny_moe_config(router_aux_loss_beta=beta)
    alpha = torch.tensor([first], dtype=torch.float64)
    for rate in rates:
        alpha = adapted(alpha, torch.tensor([rate], dtype=torch.float64), config)
    steps = len(rates)
    # eq. 9 written out: what is left of the first, and of each step's target (eq. 7: xi = 1/5, alpha_max = 0.01)
    left = [(1 - beta) * beta ** (steps - 1 - step) * min(rate / 5, 0.01) for step, rate in enumerate(rates)]
    assert alpha.item() == pytest.approx(beta**steps * first + sum(left), rel=1e-12, abs=1e-18)


def skewed_model() -> SkyworkMoeForCausalLM:
    """Tokens below 30 all go to the same experts in the first layer, and in no other."""
    fields = {"router_aux_loss_beta": 0.9, "router_aux_loss_alpha_max": 0.1, "router_capacity_factor": 1.5}
    model = model_of(router_aux_loss_coef=0.0, **fields)
    with torch.no_grad():
        model.model.embed_tokens.weight[:30, 0] += 3
        first, *others = [layer.block_sparse_moe.gate for layer in model.model.layers]
        first.weight[:2, 0] += 5
        for gate in others:
            gate.weight[:, 0] = 0
    return model


def test_a_skewed_layers_coefficient_rises_and_falls_again(tmp_path):
    data = rows(80, high=30) + rows(80, seed=1, low=30)
    trainer = trainer_of(skewed_model(), tmp_path, InOrder(data), max_steps=80, learning_rate=0.0)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "router/coefficient" in entry]
    first, second = ([entry[f"router/layer_{layer:02}/coefficient"] for entry in entries] for layer in (0, 1))
    drops = [entry["router/layer_00/drop_rate"] for entry in entries]
    assert min(drops[:40]) == 0.25  # two of four experts take all, and have room for three quarters
    assert first[:40] == sorted(first[:40])
    assert first[39] > 0.98 * 0.2 * 0.25
    assert first[39] > second[39] * 1.2
    assert first[79] < 0.8 * first[39]
    # and in each step exactly what eq. 7-9 say of the rate that was logged
    alpha = 0.0
    for coefficient, drop in zip(first, drops, strict=True):
        alpha = 0.9 * alpha + (1 - 0.9) * min(0.2 * drop, 0.1)
        assert coefficient == pytest.approx(alpha, rel=1e-12)


def test_the_loss_has_each_layers_own_coefficient():
    model = model_of().train()
    batch = batch_of(rows(2))
    plain = model(**batch).loss
    with_all = model(**batch, output_router_logits=True)
    per_layer = load_balancing_loss(with_all.router_logits, model.config)
    torch.testing.assert_close(with_all.loss, plain + model.config.router_aux_loss_coef * per_layer.sum())
    model.aux_loss_coefficients = torch.tensor([0.5, 2.0])
    own = model(**batch, output_router_logits=True)
    torch.testing.assert_close(own.loss, plain + 0.5 * per_layer[0] + 2.0 * per_layer[1])
    torch.testing.assert_close(own.aux_loss, per_layer.sum())


# --- steps of several batches, processes, padding


ONE_STEP = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
LOSSES = ("loss", "lm_loss", "router/layer_00/aux_loss", "router/layer_01/aux_loss")


def one_step(
    folder: Path, data: list[dict[str, Any]], batch: int, accumulate: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights after a step, and the `LOSSES` that are logged."""
    model = model_of(router_aux_loss_coef=5.0)  # so that it would be seen
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    trainer = trainer_of(model, folder, InOrder(data), **sizes, **ONE_STEP)
    trainer.train()
    return dict(model.named_parameters()), [trainer.state.log_history[0][name] for name in LOSSES]


def test_an_accumulated_step_has_the_mean_of_the_auxiliary_losses(tmp_path):
    data = rows(4)
    (once, of_once), (twice, of_twice) = one_step(tmp_path, data, 4, 1), one_step(tmp_path, data + data, 4, 2)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, msg=name)
    assert of_twice == pytest.approx(of_once, rel=1e-6)
    outputs = model_of().train()(**batch_of(data), output_router_logits=True)
    losses = load_balancing_loss(outputs.router_logits, tiny_moe_config()).tolist()
    plain = outputs.loss.item() - 0.01 * sum(losses)
    assert of_once == pytest.approx([plain + 5.0 * sum(losses), plain, *losses], rel=1e-5)
    alone = model_of(router_aux_loss_coef=5.0).get_parameter("model.layers.0.block_sparse_moe.gate.weight")
    assert not torch.allclose(alone, once["model.layers.0.block_sparse_moe.gate.weight"])


def test_batches_count_by_their_target_tokens():
    model = model_of(router_aux_loss_coef=3.0).train()
    batches = [batch_of(rows(2, length, seed)) for seed, length in ((1, 6), (2, 16))]
    items = torch.tensor(2 * 5 + 2 * 15)
    got = sum(model(**batch, output_router_logits=True, num_items_in_batch=items).loss for batch in batches)
    outputs = [model(**batch, output_router_logits=True) for batch in batches]
    wanted = sum(
        output.loss * share for output, share in zip(outputs, (0.25, 0.75), strict=True)
    )  # a mean by itself where nobody says how many items there are
    torch.testing.assert_close(got, wanted)


def test_coefficients_do_not_depend_on_the_accumulation(tmp_path):
    """Rows that each go to one expert of the first layer: a batch of one drops what a batch of all does not."""
    found, data = [], rows(4)
    for row, token in zip(data, (5, 6, 7, 8), strict=True):
        row["input_ids"] = torch.full((12,), token)
    plain = model_of(num_experts_per_tok=1)(**batch_of(data)).loss.item()
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = model_of(num_experts_per_tok=1)
        callback = AdaptiveAuxLossCallback()
        trainer = trainer_of(
            model,
            tmp_path,
            InOrder(data),
            callbacks=[callback],
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        found.append((callback.coefficients, without_aux_loss(callback._last)))
        assert trainer.state.log_history[0]["lm_loss"] == pytest.approx(plain, rel=1e-6)
    logits = model_of(num_experts_per_tok=1)(
        torch.stack([row["input_ids"] for row in data]), output_router_logits=True
    ).router_logits
    together = router_load(logits, model.config)
    of_each = [router_load(tuple(layer[12 * n :][:12] for layer in logits), model.config) for n in range(4)]
    assert together.drop_rates[0] < min(load.drop_rates[0] for load in of_each)
    for coefficients, statistics in found:
        assert coefficients == found[0][0]
        torch.testing.assert_close(statistics, without_aux_loss(together))


def without_aux_loss(load: RouterLoad) -> dict[str, torch.Tensor]:
    """What depends on the tokens alone, not on their batches."""
    return {name: values for name, values in load.statistics().items() if name != "aux_loss"}


def test_padding_does_not_count(tmp_path):
    config = tiny_moe_config()
    logits = tuple(torch.randn(8, 4) for _ in range(2))
    padded = tuple(
        torch.cat([torch.randn(3, 4), of_layer[:4], torch.randn(1, 4), of_layer[4:]]) for of_layer in logits
    )
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(
        router_load(padded, config, mask).statistics(), router_load(logits, config).statistics()
    )


def in_one_of_two_processes(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    data = rows(4)[2 * rank : 2 * rank + 2]
    model = model_of(router_aux_loss_coef=5.0)
    callback = AdaptiveAuxLossCallback()
    trainer = trainer_of(
        model,
        folder,
        data,
        callbacks=[callback],
        **ONE_STEP,
        ddp_backend="gloo",
        accelerator_config={"dispatch_batches": False, "split_batches": False, "even_batches": False},
    )
    # Each process has its own rows: the loader must not share them out once more.
    trainer.get_train_dataloader = partial(
        torch.utils.data.DataLoader, data, batch_size=2, collate_fn=trainer.data_collator
    )
    trainer.train()
    torch.save({name: value.detach() for name, value in model.named_parameters()}, folder / f"{rank}.pt")
    logged = [trainer.state.log_history[0][name] for name in LOSSES]
    (folder / f"{rank}.json").write_text(json.dumps([callback.coefficients, logged]))


def test_two_processes_do_what_one_does_in_two_batches(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted, losses = one_step(tmp_path, rows(4), 2, 2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, msg=name)
    (coefficients, logged), (others, _) = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert coefficients == others
    assert logged == pytest.approx(losses, rel=1e-5)
    # the mean over the processes of the drop rates of their batches
    model, drops = model_of(router_aux_loss_coef=5.0), []
    for start in (0, 2):
        ids = torch.stack([row["input_ids"] for row in rows(4)[start : start + 2]])
        logits = model(ids, output_router_logits=True).router_logits
        drops.append(router_load(logits, model.config).drop_rates)
    expected = adapted(torch.full((2,), 5.0, dtype=torch.float64), (drops[0] + drops[1]) / 2, model.config)
    assert coefficients == pytest.approx(expected.tolist())


# --- under autocast


def test_autocast_rounds_neither_the_auxiliary_loss_nor_the_counts():
    config, results = tiny_moe_config(num_experts=[16]), []
    logits = torch.randn(4096, 16) + 0.05 * torch.arange(16)
    for enabled in (False, True):
        given = logits.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = load_balancing_loss((given,), config)
            sums = router_sums((given,), config)
        loss.sum().backward()
        results.append((loss.detach(), given.grad, sums))
    for plain, under_autocast in zip(*results, strict=True):
        assert torch.equal(plain, under_autocast)
    assert load_of_step(results[1][2], config).relative_loads.sum() == pytest.approx(16, rel=1e-9)


def test_autocast_rounds_no_coefficient():
    model, losses = model_of(), torch.rand(2)
    model.aux_loss_coefficients = torch.tensor([0.0123, 0.0456])
    plain = model._weighted(losses)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model._weighted(losses), plain)


# --- with the Trainer


@pytest.mark.parametrize("restores", [False, True])
def test_resuming_continues_bit_for_bit(restores, tmp_path):
    data, options = rows(32), {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    options["restore_callback_states_from_checkpoint"] = restores
    whole = trainer_of(model_of(), tmp_path / "whole", data, **options)
    whole.train()
    resumed = trainer_of(model_of(), tmp_path / "resumed", data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    coefficients = [coefficients_of(trainer) for trainer in (whole, resumed)]
    assert coefficients[0] == coefficients[1] != [0.01, 0.01]
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert value.equal(other), name
    last = [load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "resumed")]
    assert all(value.equal(last[1][name]) for name, value in last[0].items())
    assert [entry for entry in whole.state.log_history if "loss" in entry] == [
        entry for entry in resumed.state.log_history if "loss" in entry
    ]


def coefficients_of(trainer: Trainer) -> Any:
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, AdaptiveAuxLossCallback)]
    return found[0].coefficients


def test_a_checkpoint_without_coefficients_can_be_resumed(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer_of(model_of(), tmp_path, rows(16), callbacks=[], **options).train()
    trainer = trainer_of(model_of(), tmp_path, rows(16), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = TrainerState.load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    assert saved.stateful_callbacks["AdaptiveAuxLossCallback"]["attributes"]["coefficients"] == coefficients_of(
        trainer
    )


def test_reports_have_every_layer_and_the_console_the_means(tmp_path, monkeypatch, capsys):
    reported: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        """What tensorboard, wandb and trackio are."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Reporter)
    trainer = trainer_of(model_of(), tmp_path, rows(8), report_to="recorder", max_steps=3, eval_strategy="no")
    trainer.train()
    names = {"coefficient", "aux_loss", "drop_rate", "max_load", "min_load", "entropy", "max1_max2", "max2_max3"}
    wanted = {f"router/{layer}{name}" for layer in ("", "layer_00/", "layer_01/") for name in names}
    assert len(reported) == 4
    for entry, kept in zip(reported[:3], trainer.state.log_history, strict=False):
        assert wanted == {name for name in entry if name.startswith("router/")}
        assert {name: kept[name] for name in wanted} == {name: entry[name] for name in wanted}
    assert not any(name.startswith("router/") for name in reported[3])
    printed = capsys.readouterr().out
    assert "router/drop_rate" in printed
    assert "layer_00" not in printed


def test_logs_have_the_means_over_the_steps_since_the_last_one(tmp_path):
    def logged(name: str, **options: Any) -> list[dict[str, Any]]:
        trainer = trainer_of(model_of(), tmp_path / name, InOrder(rows(12)), max_steps=6, **options)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    each, by_three = logged("each"), logged("by_three", logging_steps=3)
    for place, entry in enumerate(by_three):
        of_these = each[3 * place : 3 * place + 3]
        assert entry["loss"] == pytest.approx(sum(one["loss"] for one in of_these) / 3, rel=1e-3)
        for name in ("drop_rate", "layer_01/entropy", "max1_max2"):
            wanted = sum(one[f"router/{name}"] for one in of_these) / 3
            assert entry[f"router/{name}"] == pytest.approx(wanted, rel=1e-5)
        assert entry["router/coefficient"] == of_these[-1]["router/coefficient"]


def test_it_says_once_that_a_step_has_few_tokens(tmp_path, caplog):
    """Eight experts with top-2 drop 1.25 sqrt(6) / 40 of 160 tokens even where they are balanced."""
    logger.warning_once.cache_clear()
    for length, said in ((16, True), (200, False)):
        caplog.clear()
        model = model_of(num_experts=[8], max_position_embeddings=256)
        batches = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
        trainer_of(model, tmp_path, InOrder(rows(40, length)), max_steps=2, **batches).train()
        sentences = [record.message for record in caplog.records if "alpha_max / xi" in record.message]
        assert len(sentences) == said
        if said:
            assert "A step has 160 tokens in a process" in sentences[0]
            assert "drop 5.5% even where" in sentences[0]
            assert "above alpha_max / xi = 5.0%" in sentences[0]


def test_an_epochs_log_has_the_router_too(tmp_path):
    trainer = trainer_of(model_of(), tmp_path, rows(8), num_train_epochs=2, logging_strategy="epoch")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert all("router/layer_01/drop_rate" in entry for entry in entries)


class EvaluateAtTheEnd(TrainerCallback):
    """While the hooks of the adaptive loss are there."""

    def __init__(self, trainer: Trainer, data: Any) -> None:
        self.trainer, self.data = trainer, data

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.evaluate(self.data)
        self.trainer.model.train()


def test_an_evaluation_has_the_plain_loss_and_gathers_no_router_logits(tmp_path):
    model, data = model_of(router_aux_loss_coef=100.0), rows(4)
    seen = []
    trainer = trainer_of(model, tmp_path, data, max_steps=1, learning_rate=0.0)
    trainer.compute_metrics = lambda found: seen.append(found.predictions) or {}
    trainer.add_callback(EvaluateAtTheEnd(trainer, data))
    trainer.train()
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        plain = model.eval()(ids, labels=ids)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluated["eval_loss"] == pytest.approx(plain.loss.item(), rel=1e-5)
    assert not any(name.startswith("router/") for name in evaluated)
    assert seen[0].shape == plain.logits.shape
    model.config.output_router_logits = True
    trainer.evaluate(data)
    assert seen[1].shape == plain.logits.shape


@pytest.mark.parametrize("how", ["the Trainer's checkpointing", "PEFT's preparation of an int8 base"])
def test_gates_learn_to_balance_with_checkpointing_and_adapters(how, tmp_path):
    peft = pytest.importorskip("peft")
    model = model_of(router_aux_loss_coef=10.0, router_aux_loss_beta=0.999)  # it stays near 10
    settings = {"learning_rate": 0.01, "per_device_train_batch_size": 8}
    if how.startswith("PEFT"):
        model.save_pretrained(tmp_path / "base")
        base = SkyworkMoeForCausalLM.from_pretrained(tmp_path / "base", quantization_config=SkyworkInt8Config())
        model = peft.prepare_model_for_kbit_training(base)
        assert model.is_activation_checkpointing
    else:
        settings["activation_checkpointing"] = True
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    adapted_model, data = peft.get_peft_model(model, lora), rows(8)
    ids = torch.stack([row["input_ids"] for row in data])

    def aux_loss() -> float:
        with torch.no_grad():
            return adapted_model(input_ids=ids, output_router_logits=True).aux_loss.item()

    before = aux_loss()
    trainer_of(adapted_model, tmp_path, data, max_steps=20, **settings).train()
    assert aux_loss() < 0.2 * before


def test_checkpointing_that_cuts_the_gradient_off_is_refused(tmp_path):
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r'activation_checkpointing_kwargs=\{"use_reentrant": False\}'):
        trainer_of(model_of(), tmp_path, rows(4), max_steps=1, **reentrant).train()


def test_nothing_stays_on_the_model(tmp_path, pictures):
    model = model_of()
    hooks = [len(model._forward_hooks), len(model._forward_pre_hooks)]
    trainer = trainer_of(model, tmp_path, rows(8), max_steps=2)
    trainer.train()
    assert [len(model._forward_hooks), len(model._forward_pre_hooks)] == hooks
    assert model.aux_loss_coefficients is None
    assert pictures == [tmp_path / "router.png"]
    assert model.train()(**{"input_ids": rows(1)[0]["input_ids"][None]}).router_logits is None


def test_a_training_that_broke_off_is_not_counted_twice(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model, callback, breaks = model_of(), AdaptiveAuxLossCallback(), Breaks()
    trainer = trainer_of(model, tmp_path, rows(8), callbacks=[breaks, callback], max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(breaks)
    trainer.train()
    assert callback._last.tokens.tolist() == [24, 24]


def test_without_matplotlib_a_sentence_says_so(tmp_path, monkeypatch, caplog, pictures):
    real = skywork_hf.training.aux_loss.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
    )
    trainer_of(model_of(), tmp_path, rows(8), max_steps=1).train()
    assert "router.png is not drawn: it needs matplotlib" in caplog.text
    assert not pictures


# --- what cannot be


def test_a_model_without_experts(tmp_path):
    trainer = trainer_of(SkyworkForCausalLM(tiny_dense_config()), tmp_path, rows(4), max_steps=1)
    with pytest.raises(ValueError, match="trains SkyworkMoeForCausalLM; SkyworkForCausalLM holds none"):
        trainer.train()


def test_labels_that_the_trainer_smooths(tmp_path):
    trainer = trainer_of(model_of(), tmp_path, rows(4), max_steps=1, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 makes the Trainer compute the loss itself"):
        trainer.train()


def test_a_loss_of_the_users_own_is_spoken_of(tmp_path):
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.float().logsumexp(-1).mean()

    trainer = trainer_of(model_of(), tmp_path, rows(4), max_steps=1)
    trainer.compute_loss_func = loss
    with CaptureLogger(logger) as said:
        trainer.train()
    assert "The model gets no labels (as with `compute_loss_func`)" in said.out
    assert "lm_loss" not in trainer.state.log_history[0]  # whatever `loss` is the sum of


def test_a_step_without_targets_leaves_no_nan(tmp_path):
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows(4)]
    model = model_of()
    trainer_of(model, tmp_path, data, max_steps=2).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_trainer_that_replaces_the_models_forward(tmp_path):
    @dataclass
    class Fused(ModelOutput):  # TRL's SFTTrainer returns such a one
        loss: torch.Tensor | None = None

    model = model_of()
    forward = model.forward
    model.forward = wraps(forward)(lambda **inputs: Fused(loss=forward(**inputs).loss))
    with pytest.raises(ValueError, match=r"replaced by one that computes another loss \(Fused, as TRL"):
        trainer_of(model, tmp_path, rows(4), max_steps=1).train()


def test_one_process_with_several_gpus():
    with pytest.raises(ValueError, match="One process trains on 2 GPUs"):
        AdaptiveAuxLossCallback().on_train_begin(SimpleNamespace(n_gpu=2), TrainerState(), None, model=model_of())


def test_a_checkpoint_of_other_layers():
    state = TrainerState(global_step=3)
    state.stateful_callbacks["AdaptiveAuxLossCallback"] = {"args": {}, "attributes": {"coefficients": [0.1] * 5}}
    with pytest.raises(ValueError, match="for 5 MoE layers, the model has 2"):
        AdaptiveAuxLossCallback().on_train_begin(
            SimpleNamespace(n_gpu=0, label_smoothing_factor=0.0), state, None, model=model_of()
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("router_aux_loss_beta", 1.0),
        ("router_aux_loss_beta", -0.1),
        ("router_aux_loss_xi", -1.0),
        ("router_aux_loss_alpha_max", -1.0),
        ("router_capacity_factor", 0),
    ],
)
def test_fields_that_mean_nothing(field, value):
    with pytest.raises(ValueError, match=f"`{field}`={value}"):
        tiny_moe_config(**{field: value})


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    arguments = (Path(sys.argv[1]),)
    torch.multiprocessing.start_processes(in_one_of_two_processes, arguments, nprocs=2, start_method="fork")
