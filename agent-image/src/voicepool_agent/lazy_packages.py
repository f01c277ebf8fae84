"""Imports only those parts of a package that someone asks for, for packages that re-export hundreds of modules.

`import openai` imports 460 modules of `openai.types`, 0.3 s and 20 MB, of which a chat uses a dozen. For the packages
named here each `from .module import Name` of an `__init__.py` is put off until `Name` is asked for (PEP 562).
Invariants: every name that was there is there; every other statement runs as it stands; a package that cannot be read
in this way is imported as usual.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

OPENAI_TYPES = "openai.types"


class LazyPackages(importlib.abc.MetaPathFinder):
    """Finds the packages at and below a name, and makes them lazy; leaves everything else to the next finder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != self._name and not fullname.startswith(self._name + "."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.submodule_search_locations is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        spec.loader = _LazyLoader(spec.loader.name, spec.loader.path)
        return spec


class _LazyLoader(SourceFileLoader):
    """Runs an `__init__.py` without its relative imports, and makes them when their names are asked for."""

    def exec_module(self, module: ModuleType) -> None:
        tree = ast.parse(self.get_data(self.path), self.path)
        sources: dict[str, tuple[str, str]] = {}
        rest: list[ast.stmt] = []
        for statement in tree.body:
            if isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module is not None:
                for one in statement.names:
                    sources[one.asname or one.name] = (f"{module.__name__}.{statement.module}", one.name)
            else:
                rest.append(statement)
        if "*" in sources:
            super().exec_module(module)
            return

        def attribute(name: str) -> Any:
            if name in sources:
                source, original = sources[name]
                value = getattr(importlib.import_module(source), original)
                setattr(module, name, value)
                return value
            if name in submodules:  # importing one of its names would have bound it
                return importlib.import_module(f"{module.__name__}.{name}")
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        submodules = {source.removeprefix(module.__name__ + ".").partition(".")[0] for source, _ in sources.values()}
        namespace = module.__dict__
        namespace["__getattr__"] = attribute
        namespace["__dir__"] = lambda: sorted({*namespace, *sources, *submodules})
        exec(compile(ast.Module(rest, tree.type_ignores), self.path, "exec", dont_inherit=True), namespace)  # noqa: S102 - the package's own code


def install(name: str = OPENAI_TYPES) -> None:
    """Make the packages at and below a name lazy, from now on; those that are imported already stay as they are."""
    sys.meta_path.insert(0, LazyPackages(name))
