"""Write a static FP8 checkpoint, the layout of Skywork-MoE-Base-FP8, from a 16-bit one and some text.

    python conversion/calibrate_fp8.py Skywork/Skywork-MoE-Base skywork-moe-fp8 --texts texts.txt

The texts run through the 16-bit model, which notes the largest activation of every linear; a few hundred paragraphs of
the kind that the model will read are enough. One text a line. The result appears under its name when it is complete.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import skywork_hf  # noqa: F401
from skywork_hf.quantization.calibration import calibrate, quantize_static


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a 16-bit checkpoint: a folder or a Hub name")
    parser.add_argument("destination", type=Path, help="the folder to write; it must not be there yet")
    parser.add_argument("--texts", type=Path, required=True, help="a UTF-8 file with one text a line")
    arguments = parser.parse_args()
    try:
        write_static_fp8(arguments.source, arguments.destination, arguments.texts)
    except (OSError, ValueError) as error:
        sys.exit(f"calibrate_fp8: {error}")


def write_static_fp8(source: str, destination: Path, texts: Path) -> None:
    """Calibrate `source` on the lines of `texts` and write `destination`.

    Raises:
        ValueError: `destination` or its ".unfinished" is there already, there is no text, or the source is quantised
            already.
    """
    unfinished = destination.with_name(f"{destination.name}.unfinished")
    for folder in (destination, unfinished):
        if os.path.lexists(folder):
            raise ValueError(f"{folder} is there already: choose another name, or remove it.")
    lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{texts} holds no text: expected one text a line.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, device_map="auto")
    if getattr(model, "hf_quantizer", None):
        raise ValueError(f"{source} is quantised already: calibration needs the 16-bit checkpoint.")
    limit = model.config.max_position_embeddings
    ids = [tokenizer(line, return_tensors="pt", truncation=True, max_length=limit).input_ids for line in lines]
    quantize_static(model, calibrate(model, ids))

    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Wrote {destination}.")


if __name__ == "__main__":
    main()
