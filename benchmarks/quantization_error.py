"""What quantisation costs in accuracy: the tables of docs/quantization.md.

    python benchmarks/quantization_error.py

1. Relative error of a linear's outputs, |quantised - exact| / |exact| over all outputs, on Gaussian weights (0.02) and
   inputs (1.0) of the real row lengths, 512 outputs and 256 tokens, against float32. To stay under: 1.2 % for
   int8 weights, 2 % for int8 weights and activations, 4 % for FP8.
2. On the tiny checkpoints that come with the package and its tests (random weights, so all of this is very
   sensitive): the share of routed (token, expert) pairs that stay the same in the first layer and in the last, the
   relative error of the logits, and how often the most likely token stays the same.

FP8 activations are computed by torch's CPU implementation of `_scaled_mm`, exact and slow.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from skywork_hf import SkyworkFp8Config, SkyworkInt8Config
from skywork_hf.quantization import formats, matmul

FP8_FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "skywork-moe-tiny-fp8"


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


def linear_errors() -> None:
    print(f"{'relative error of a linear':34}{'row of 4608':>14}{'row of 12288':>14}{'at most':>10}")
    weight_only, int8, fp8 = matmul.dequantized_linear, formats.quantize_int8, formats.quantize_fp8
    kinds: dict[str, tuple[float, Any, Any]] = {
        "int8 weights": (1.2, int8, weight_only),
        "int8 weights and activations": (2.0, int8, matmul.int8_activations_linear),
        "FP8 weights": (4.0, fp8, weight_only),
        "FP8 weights and activations": (4.0, fp8, fp8_activations),
        "FP8 weights made int8": (4.0, lambda weight: int8(*fp8(weight)), weight_only),
    }
    for name, (limit, quantize, run) in kinds.items():
        errors = []
        for length in (4608, 12288):
            torch.manual_seed(0)
            inputs, weight = torch.randn(256, length), torch.randn(512, length) * 0.02
            errors.append(relative(run(inputs, *quantize(weight)), inputs @ weight.t()))
        print(f"{name:34}{errors[0]:14.2%}{errors[1]:14.2%}{limit:9.1f}%")


def fp8_activations(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scaled = formats.fp8_scale(inputs)
    return torch._scaled_mm(formats.to_fp8(inputs, scaled), weight.t(), scaled, scale, out_dtype=torch.float32)


@torch.no_grad()
def outputs(path: Path, config: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The experts chosen in each layer and the logits, for the real tokens of the golden inputs."""
    golden = load_file(path / "golden.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    chosen: list[torch.Tensor] = []
    mask = golden["attention_mask"].bool()
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.register_forward_hook(
            lambda module, inputs, result: chosen.append(result[2].view(*mask.shape, -1)[mask])
        )
    logits = model(**{name: golden[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits
    return chosen, logits[mask]


def kept(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of `one`'s experts that are among `other`'s, token by token."""
    return (one.unsqueeze(-1) == other.unsqueeze(-2)).any(-1).float().mean().item()


def compare(name: str, exact: tuple[list[torch.Tensor], torch.Tensor], path: Path, config: Any) -> None:
    chosen, logits = outputs(path, config)
    first, last = kept(chosen[0], exact[0][0]), kept(chosen[-1], exact[0][-1])
    same = (logits.argmax(-1) == exact[1].argmax(-1)).float().mean().item()
    print(f"{name:34}{first:14.1%}{last:14.1%}{relative(logits, exact[1]):14.1%}{same:14.1%}")


def agreement() -> None:
    print(f"\n{'':34}{'first routing':>14}{'last routing':>14}{'logits error':>14}{'same token':>14}")
    moe = Path(__file__).parent.parent / "tests" / "fixtures" / "skywork-moe-tiny"
    exact = outputs(moe, None)
    compare("int8", exact, moe, SkyworkInt8Config())
    compare("FP8, weight-only", exact, moe, SkyworkFp8Config("none"))
    compare("bitsandbytes int8", exact, moe, BitsAndBytesConfig(load_in_8bit=True))
    compare("bitsandbytes NF4", exact, moe, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    weight_only = outputs(FP8_FIXTURE, None)
    print("the FP8 fixture, against itself weight-only:")
    compare("made int8", weight_only, FP8_FIXTURE, SkyworkFp8Config(int8_devices="all"))
    matmul.has_fp8_unit = lambda device: True  # type: ignore[assignment]
    compare("static activations", weight_only, FP8_FIXTURE, None)
    compare("dynamic activations", weight_only, FP8_FIXTURE, SkyworkFp8Config("dynamic"))


def main() -> None:
    warnings.simplefilter("ignore")  # that given arguments override what config.json says is the point here
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    linear_errors()
    agreement()


if __name__ == "__main__":
    main()
