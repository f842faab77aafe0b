"""Write a MoE checkpoint whose experts are copies of a dense one's feed-forward networks, to be trained further.

    python conversion/upcycle_dense_to_moe.py Skywork-13B-Base skywork-moe-start --experts 16 --top-k 2

The same as `skywork-hf upcycle`; `--help` lists the arguments.
"""

import sys

from skywork_hf.cli import main

if __name__ == "__main__":
    main(["upcycle", *sys.argv[1:]])
