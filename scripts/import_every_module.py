"""Import every module of skywork_hf: with only the base dependencies installed, none may need an extra to import, but
for what is written with one and is imported where that is installed."""

import importlib
import pkgutil
from importlib.util import find_spec

import skywork_hf

_OF_TRITON = ("expert_table", "triton_blocks", "triton_kernels", "triton_programs")
WRITTEN_WITH = {"skywork_hf.quantization.cpu_kernels": "numba"}
WRITTEN_WITH |= {f"skywork_hf.quantization.{name}": "triton" for name in _OF_TRITON}

if __name__ == "__main__":
    names = [module.name for module in pkgutil.walk_packages(skywork_hf.__path__, "skywork_hf.")]
    for name in names:
        if not name.endswith("__main__") and find_spec(WRITTEN_WITH.get(name, "skywork_hf")):
            importlib.import_module(name)
    print(f"{len(names)} modules import.")
