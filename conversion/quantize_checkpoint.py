"""Write a 16-bit checkpoint with one byte for each weight of attention and experts.

    python conversion/quantize_checkpoint.py Skywork-MoE-Base skywork-moe-int8 --method int8

The same as `skywork-hf quantize`; `--help` lists the arguments. Static FP8 needs text: see calibrate_fp8.py.
"""

import sys

from skywork_hf.cli import main

if __name__ == "__main__":
    main(["quantize", *sys.argv[1:]])
