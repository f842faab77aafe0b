"""Import every module of skywork_hf: with only the base dependencies installed, none may need an extra to import."""

import importlib
import pkgutil

import skywork_hf

if __name__ == "__main__":
    names = [module.name for module in pkgutil.walk_packages(skywork_hf.__path__, "skywork_hf.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    print(f"{len(names)} modules import.")
