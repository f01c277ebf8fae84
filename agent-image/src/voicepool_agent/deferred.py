"""Puts off work that Pipecat's imports do and that most calls never need.

Four things, 0.1 s and 12 MB together: httpx's command line (it imports three packages for coloured text), the number
words of sixty languages, the validators of Pipecat's pydantic models, of which a call uses a few, and OpenTelemetry's
SDK, which Pipecat imports where it is installed. Invariants: each is made when it is first used, by the package's own
code; models of a bot are made as they always are, and so are traces of a bot.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from pydantic import BaseModel

COMMAND_LINE = "httpx._main"
"""httpx itself does without, where the packages for it are not installed."""

NUMBER_WORDS = "num2words"
"""A package, and its function of the same name."""

MODELS = "pipecat"

TRACING = "pipecat.utils.tracing.setup"
SDK = "opentelemetry.sdk.resources"
"""The first of the SDK's modules that it imports."""


class Deferred(importlib.abc.MetaPathFinder):
    """Finds the four; leaves everything else to the next finder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`.

        Raises:
            ModuleNotFoundError: for httpx's command line, always.
        """
        if fullname == COMMAND_LINE:
            raise ModuleNotFoundError(f"{fullname} is for terminals", name=fullname)
        loaders = {NUMBER_WORDS: _LoadsWhenCalled, MODELS: _PutsOffModels, TRACING: _TracesWhenSetUp}
        kind = loaders.get(fullname) or (_PutsOffModels if fullname.startswith(MODELS + ".") else None)
        spec = PathFinder.find_spec(fullname, path, target) if kind else None
        if spec is None or kind is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        spec.loader = kind(spec.loader.name, spec.loader.path)
        return spec


class _LoadsWhenCalled(SourceFileLoader):
    """Makes a module of one function, which loads the whole module when it is called or something else is asked for."""

    def exec_module(self, module: ModuleType) -> None:
        namespace = module.__dict__
        name = module.__name__

        def load(attribute: str) -> Any:
            if namespace.pop("__getattr__", None) is not None:
                namespace.pop(name, None)
                super(_LoadsWhenCalled, self).exec_module(module)
            return getattr(module, attribute)

        def function(*arguments: Any, **named: Any) -> Any:
            return load(name)(*arguments, **named)

        namespace[name] = function
        namespace["__getattr__"] = load


class _PutsOffModels(SourceFileLoader):
    """Runs a module with pydantic told to build the validators of its models when they are first used."""

    def exec_module(self, module: ModuleType) -> None:
        before = BaseModel.model_config.get("defer_build", False)
        BaseModel.model_config["defer_build"] = True
        try:
            super().exec_module(module)
        finally:
            BaseModel.model_config["defer_build"] = before


class _TracesWhenSetUp(SourceFileLoader):
    """Runs Pipecat's set-up of tracing without the SDK, and once more, with it, when a bot sets tracing up."""

    def exec_module(self, module: ModuleType) -> None:
        if SDK in sys.modules or importlib.util.find_spec(SDK) is None:
            super().exec_module(module)
            return
        sys.modules[SDK] = None  # type: ignore[assignment]  # what cannot be imported is None there
        try:
            super().exec_module(module)
        finally:
            del sys.modules[SDK]

        def setup_tracing(*arguments: Any, **named: Any) -> Any:
            super(_TracesWhenSetUp, self).exec_module(module)
            return module.setup_tracing(*arguments, **named)

        module.OPENTELEMETRY_AVAILABLE = True  # type: ignore[attr-defined]
        module.setup_tracing = setup_tracing  # type: ignore[attr-defined]


def install() -> None:
    """Put them off from now on; what is imported already stays as it is."""
    sys.meta_path.insert(0, Deferred())
