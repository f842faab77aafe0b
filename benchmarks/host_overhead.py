"""What a decoded token costs besides its arithmetic: models so narrow that only the calls take time.

    OMP_NUM_THREADS=1 python benchmarks/host_overhead.py [--rounds 30] [--layers 52]

Hidden 64, 52 layers, 16 experts, top 2, one thread; one row with a cache. Ours in int8 and bfloat16, the same placed
by `device_map="experts"` (which here means the CPU, and needs no hooks), with half of the experts on the disk (which
does: the forward of placement, and accelerate's hooks), and transformers' Mixtral with grouped and batched experts.
All are in one process and take turns, token by token; given is each one's fastest token, divided by its layers.

The parts are measured afterwards, with clocks around the modules: the gate; routing, until the first expert begins;
the experts; gathering, from the end of the last expert on; the rest, which is attention, norms and whatever runs once
a token. Clocks take time too, so that the parts' sum is a little above the whole.

To reach: ours at most 0.85 of Mixtral with grouped experts, and placed at most 1.10 of the same not placed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from load import write_mixtral  # beside this file

from skywork_hf.compat import CACHE
from skywork_hf.modeling_skywork_moe import SkyworkMoeExperts

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
}
GROUPED = "Mixtral bf16, grouped"
PROMPT, DECODED = 8, 16
PARTS = ("gate", "routing", "experts", "gathering", "rest")


def write_checkpoints(folder: Path, layers: int) -> None:
    from transformers import AutoModelForCausalLM

    from skywork_hf import SkyworkInt8Config, SkyworkMoeConfig

    torch.manual_seed(0)
    config = SkyworkMoeConfig(**SHAPE, num_hidden_layers=layers)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "bf16")
    write_mixtral(folder / "mixtral", folder / "bf16")
    int8 = AutoModelForCausalLM.from_pretrained(folder / "bf16", quantization_config=SkyworkInt8Config())
    int8.save_pretrained(folder / "int8")


def load_all(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    def load(name: str, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16, **options)

    models = {}
    for name in ("int8", "bf16"):
        models[f"ours {name}"] = load(name)
        models[f"ours {name}, experts"] = load(name, device_map="experts", context_tokens=64)
        models[f"ours {name}, half on disk"] = load(name, device_map=half_on_disk(models[f"ours {name}"]))
    for kind in ("grouped", "batched"):
        models[f"Mixtral bf16, {kind}"] = load("mixtral", experts_implementation=f"{kind}_mm")
    return models


def half_on_disk(model: Any) -> dict[str, str]:
    """A device map whose parts are those of `device_map="experts"`, with every other expert on the disk."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    for number, layer in enumerate(model.model.layers):
        name = f"model.layers.{number}"
        places |= dict.fromkeys((f"{name}.{part}" for part, _ in layer.named_children()), "cpu")
        del places[f"{name}.block_sparse_moe"]
        places[f"{name}.block_sparse_moe.gate"] = "cpu"
        experts = len(layer.block_sparse_moe.experts)
        places |= {f"{name}.block_sparse_moe.experts.{n}": ("cpu", "disk")[n % 2] for n in range(experts)}
    return places


def decode(model: Any) -> Iterator[float]:
    """Seconds of each decoded token, after a prompt."""
    ids = torch.arange(3, 3 + PROMPT + DECODED).unsqueeze(0)
    cache = getattr(model(ids[:, :PROMPT], use_cache=True), CACHE)
    for place in range(PROMPT, PROMPT + DECODED):
        start = time.perf_counter()
        model(ids[:, place : place + 1], use_cache=True, **{CACHE: cache})
        yield time.perf_counter() - start


def fastest(models: dict[str, Any], rounds: int) -> dict[str, float]:
    """Each model's fastest token in seconds; they take turns, as whatever else runs here disturbs all alike then."""
    seconds = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for turns in zip(*(decode(model) for model in models.values()), strict=True):
            for name, taken in zip(models, turns, strict=True):
                seconds[name] = min(seconds[name], taken)
    return seconds


class Clocks:
    """Clocks around the parts of one of our models; `parts` holds the seconds of each since `reset`."""

    def __init__(self, model: Any) -> None:
        self.reset()
        for module in model.modules():
            if isinstance(module, SkyworkMoeExperts):
                self._around(module, self._of_container)
                for expert in module:
                    self._around(expert, self._of_expert)
            elif hasattr(module, "gate") and hasattr(module, "experts"):
                self._around(module.gate, self._of_gate)

    def reset(self) -> None:
        self.parts = dict.fromkeys(PARTS[:-1], 0.0)
        self._ran: list[tuple[float, float]] = []

    def _around(self, module: Any, note: Callable[[float, float], None]) -> None:
        forward = module.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            note(start, time.perf_counter())
            return result

        module.forward = timed

    def _of_gate(self, start: float, end: float) -> None:
        self.parts["gate"] += end - start

    def _of_expert(self, start: float, end: float) -> None:
        self._ran.append((start, end))

    def _of_container(self, start: float, end: float) -> None:
        first, last = self._ran[0][0], self._ran[-1][1]
        self.parts["routing"] += first - start
        self.parts["experts"] += last - first
        self.parts["gathering"] += end - last
        self._ran.clear()


def breakdown(model: Any, rounds: int) -> dict[str, float]:
    """The seconds of each part in the token in which it was fastest."""
    clocks, parts = Clocks(model), dict.fromkeys(PARTS, float("inf"))
    for _ in range(rounds):
        tokens = decode(model)
        next(tokens)  # after the prompt, which the clocks have seen too
        clocks.reset()
        for seconds in tokens:
            taken = {**clocks.parts, "rest": seconds - sum(clocks.parts.values())}
            parts = {part: min(parts[part], taken[part]) for part in PARTS}
            clocks.reset()
    return parts


@torch.no_grad()
def report(folder: Path, layers: int, rounds: int) -> None:
    models = load_all(folder)
    seconds = fastest(models, rounds)
    print(f"microseconds a layer, the fastest of {rounds * DECODED} tokens; {torch.get_num_threads()} thread(s)")
    print(f"{'':26}{'whole':>8}{'of grouped':>12}" + "".join(f"{part:>11}" for part in PARTS))
    for name, model in models.items():
        line = f"{name:26}{seconds[name] / layers * 1e6:8.0f}{seconds[name] / seconds[GROUPED]:12.2f}"
        if name.startswith("ours"):
            parts = breakdown(model, max(1, rounds // 4))
            line += "".join(f"{parts[part] / layers * 1e6:11.1f}" for part in PARTS)
        print(line)
    for name in ("int8", "bf16"):
        whole, placed = f"ours {name}", f"ours {name}, half on disk"
        print(f"{name}: {seconds[whole] / seconds[GROUPED]:.2f} of Mixtral grouped, to reach: at most 0.85; ", end="")
        print(f"placed {seconds[placed] / seconds[whole]:.2f} of not placed, to reach: at most 1.10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=52)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder), arguments.layers)
        report(Path(folder), arguments.layers, arguments.rounds)


if __name__ == "__main__":
    main()
