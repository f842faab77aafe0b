"""lm-eval takes our models as those of transformers, and its numbers are the models' own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from skywork_hf.demo import trained_checkpoint

REQUESTS = [("法国的首都叫", "巴黎"), ("The capital of Japan is", " Tokyo"), ("9 + 13 =", " 22"), ("熟能生", "巧。")]
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    start = tokenizer(context, return_tensors="pt").input_ids
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    likelihoods = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return float(likelihoods[start.shape[1] - 1 :].sum())


@pytest.fixture(scope="module")
def trained():
    model = AutoModelForCausalLM.from_pretrained(trained_checkpoint(), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(trained_checkpoint())


def test_log_likelihoods_are_the_models(trained, caplog):
    caplog.set_level(logging.WARNING)
    evaluated = HFLM(pretrained=str(trained_checkpoint()), dtype="float32", device="cpu", batch_size=2)
    assert evaluated.backend == "causal"
    assert "neither marked as CausalLM" not in caplog.text
    requests = [Instance("loglikelihood", {}, arguments, index) for index, arguments in enumerate(REQUESTS)]
    found = [value for value, _ in evaluated.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx([log_likelihood(*trained, *request) for request in REQUESTS], abs=1e-3)
    prompts = [Instance("generate_until", {}, ("法国的首都叫", {"until": ["。"], "max_gen_toks": 8}), 0)]
    model, tokenizer = trained
    inputs = tokenizer("法国的首都叫", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
    expected = tokenizer.decode(generated, skip_special_tokens=True).partition("。")[0]
    assert evaluated.generate_until(prompts, disable_tqdm=True) == [expected]


def test_the_command(trained, tmp_path):
    rows = [
        {"question": question, "choices": [right, wrong]}
        for (question, right), (_, wrong) in zip(REQUESTS, REQUESTS[1:] + REQUESTS[:1], strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "capitals.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    command = [sys.executable, "-m", "skywork_hf", "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={trained_checkpoint()},dtype=float32", "--tasks", "capitals"]
    command += ["--include_path", tmp_path, "--output_path", tmp_path / "results.json"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    [written] = tmp_path.glob("results*.json")
    accuracy = json.loads(written.read_text())["results"]["capitals"]["acc,none"]
    better = [log_likelihood(*trained, row["question"], row["choices"][0]) for row in rows]
    worse = [log_likelihood(*trained, row["question"], row["choices"][1]) for row in rows]
    assert accuracy == sum(a > b for a, b in zip(better, worse, strict=True)) / len(rows)
