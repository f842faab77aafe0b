"""Write a checkpoint in another layout, dtype or sharding; the source's layout is found out.

    python conversion/convert_checkpoint.py Skywork-13B-Base skywork-13b-llama --to llama

The same as `skywork-hf convert`; `--help` lists the arguments.
"""

import sys

from skywork_hf.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
