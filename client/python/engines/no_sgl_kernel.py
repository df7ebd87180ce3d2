"""Stands in for SGLang's kernels on a machine without a GPU: every name can be imported, none can be called."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

__version__ = "0"


class Absent:
    """A kernel that is not there, by its name."""

    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *arguments: object, **named: object) -> None:
        raise NotImplementedError(f"{self.__name__} needs a GPU")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module below this one, and finds the same in it."""

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = Absent(module.__name__).__getattr__


sys.meta_path.append(Finder())
__getattr__ = Absent(__name__).__getattr__
