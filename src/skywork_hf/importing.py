"""Doing something when another library is imported, without importing it for that."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, function: Callable[[Any], None]) -> None:
    """Call `function` with the module `name` when that has been imported; now, if it has been."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, function))


class _Waiting(MetaPathFinder):
    def __init__(self, name: str, function: Callable[[Any], None]) -> None:
        self.name, self.function = name, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # so that the others find it
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = self._then(loader.exec_module)
        return spec

    def _then(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            self.function(module)

        return execute_and_call
