"""`transformers serve`, asked by the `openai` client, says what `generate` says, in Chinese and streamed too."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skywork_hf.demo import trained_checkpoint

MODEL = str(trained_checkpoint())
SECONDS_TO_START = 120


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "skywork_hf", "-m", "transformers", "serve", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)
    try:
        for _ in range(SECONDS_TO_START * 2):
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        print(log.read_text()[-3000:])
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def expected():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def answer(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


@pytest.mark.parametrize("text", ["熟能生", "七加十三等于", "What is the capital of Japan?"])
def test_it_answers_as_generate_does(text, client, expected):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0}
    answer = client.chat.completions.create(**asked).choices[0].message.content
    assert answer == expected(text)
    chunks = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunks) == answer
    assert len([chunk for chunk in chunks if chunk]) > 1
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(chunks)
