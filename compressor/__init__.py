"""compressor: prune a language model to a size, distill it back to health, prove it.

What a command does, one function here does: see `__all__`, and compressor.pipeline.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import bench, cache, distill, evaluate, export, package, plan

__all__ = ["bench", "cache", "distill", "evaluate", "export", "package", "plan"]


class _Package(ModuleType):
    """Keeps `compressor.distill` the function: importing the room of that name would put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            return getattr(import_module("compressor.pipeline"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
