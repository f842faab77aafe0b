"""DeepSpeed's ZeRO-3: two processes whose tokens leave other experts idle compute and learn what one process does."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import LAYOUTS, checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from two_processes import rows_of_the_processes, start_two_processes, whole_model

LEARNING_RATE = 0.5
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # or tiny weights stay whole
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_clipping": 0,  # to a norm of 1 where nothing is said
    "zero_allow_untested_optimizer": True,  # SGD: a wrong gradient moves weights as far as it is wrong
    "zero_force_ds_cpu_optimizer": False,  # which is compiled
}


def differences(equally_many):
    """Of an engine from one process that has all rows, in what is computed by turns."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    alone = whole_model()
    rows = rows_of_the_processes(alone, equally_many)
    ids = rows[dist.get_rank()]
    model = copy.deepcopy(alone)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine = deepspeed.initialize(model=model, optimizer=sgd, config=CONFIG)[0]
    engine.train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=LEARNING_RATE)
    pairs = list(zip(model.parameters(), alone.parameters(), strict=True))
    for step in (1, 2):
        optimizer.zero_grad()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        sum(alone(row, labels=row).loss / 2 for row in rows).backward()
        yield f"gradients of step {step}", largest((safe_get_full_grad(own), one.grad) for own, one in pairs)
        engine.step()
        optimizer.step()
        yield f"weights after step {step}", largest((safe_get_full_fp32_param(own), one) for own, one in pairs)

    engine.eval()
    ids = rows_of_the_processes(alone, equally_many)[dist.get_rank()]
    with torch.no_grad():
        yield "evaluation", (engine(input_ids=ids).logits - alone(ids).logits).abs().max().item()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    yield "generation", float((engine.generate(ids, **options) != alone.generate(ids, **options)).sum())
    engine.destroy()


def difference_when_saved(layout, folder):
    """Of a checkpoint that the Trainer loads, trains and saves from what one process makes of it."""
    options = {"experts_layout": layout, "dtype": torch.float32}
    alone = AutoModelForCausalLM.from_pretrained(checkpoint("skywork-moe-tiny"), **options)
    optimizer = torch.optim.SGD(alone.parameters(), lr=LEARNING_RATE)
    rows = [[5, 6, 9, 11], [7, 9, 30, 2]]
    for _ in range(2):
        optimizer.zero_grad()
        sum(alone(ids, labels=ids).loss / 2 for ids in torch.tensor(rows).split(1)).backward()
        optimizer.step()
    alone.save_pretrained(folder / "alone")  # the first process does

    arguments = TrainingArguments(
        folder,
        deepspeed=CONFIG,  # from here on, `from_pretrained` loads the shares of the processes
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=2,
        optim="sgd",
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint("skywork-moe-tiny"), **options)
    assert all(parameter.ds_numel > parameter.numel() for parameter in model.parameters())
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    trainer.save_model(folder)
    unset_hf_deepspeed_config()
    dist.barrier()
    saved, wanted = (load_file(path / "model.safetensors") for path in (folder, folder / "alone"))
    assert saved.keys() == wanted.keys()
    return largest((saved[name], wanted[name]) for name in saved)


def largest(pairs):
    return max((own - one).abs().max().item() for own, one in pairs)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3_computes_and_learns_what_one_process_does(tmp_path):
    start_two_processes(Path(__file__), tmp_path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert len(found) == 2 * 6 + 2
        assert {name: difference for name, difference in found.items() if difference > 1e-5} == {}


def main(folder):
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles for minutes
    deepspeed.init_distributed(dist_backend="gloo")
    found = {
        f"{'equally' if equally_many else 'unequally'} many, {what}": difference
        for equally_many in (True, False)
        for what, difference in differences(equally_many)
    }
    for layout in LAYOUTS:
        found[f"{layout}, saved"] = difference_when_saved(layout, folder / layout)
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
