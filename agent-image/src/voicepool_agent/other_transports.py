"""Lets a bot be built that names transports which no pod of a pool is ever called over.

Pipecat's examples offer Daily, Twilio and WebRTC side by side, and import what belongs to each at the top. Here every
call comes through LiveKit. So a transport whose package is not in the image can be imported all the same (and only
then fails when somebody makes one), and a bot whose `transport_params` have no entry "livekit" gets one with the
parameters of an entry that it has. Invariants: a bot
gets a package that is there, and is told of one that is missing, as everywhere; only Pipecat's transports do without.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

TRANSPORTS = "pipecat.transports."
RUNNER_UTILITIES = "pipecat.runner.utils"
PACKAGES = frozenset({"aiortc", "av", "daily", "fastapi", "moq", "starlette", "vonage_video_connector"})
"""What Pipecat's transports other than LiveKit import."""

UNUSED = frozenset({"fastapi", "starlette"})
"""Of these, what is in the image for another purpose (a bot's own routes). It costs 6 MB, which a transport
that nobody calls is not worth."""

PREFERRED = ("webrtc", "daily")
"""Whose parameters LiveKit takes over where a bot has several; they are for a browser's full band, as LiveKit's are."""


class TransportNotInstalled(Exception):
    """A transport is to be used whose package is not in the image."""


class _Missing(type):
    """A class that takes the place of one that is not there. It can be named and inherited from, not used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(cls.__module__, f"{cls.__qualname__}.{name}")

    def __call__(cls, *_arguments: Any, **_named: Any) -> Any:
        origin = next(one for one in cls.__mro__ if one.__module__.partition(".")[0] in PACKAGES)
        package = origin.__module__.partition(".")[0]
        raise TransportNotInstalled(
            f"{cls.__qualname__} needs the package {package}, which is not in the image;"
            " agents of a pool are called over LiveKit"
        )


def _missing(module: str, name: str) -> Any:
    return _Missing(name, (), {"__module__": module})


class _Placeholder(ModuleType):
    """A package that is not there, while a transport is imported that wants it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(self.__name__, name)


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds placeholders of packages, only while a transport is being imported."""

    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages
        self._depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        package = fullname.partition(".")[0]
        if not self._depth or package not in self._packages:
            return None
        if not isinstance(sys.modules.get(package, _Placeholder(package)), _Placeholder):
            return None  # somebody has imported it, and a part of it must be real as well
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See `importlib.abc.Loader`."""
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if not self._depth:
            for name in [name for name, module in sys.modules.items() if isinstance(module, _Placeholder)]:
                del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder):
    """Puts our loaders before Pipecat's transports and its `create_transport`."""

    def __init__(self, *placeholders: _Placeholders) -> None:
        self._placeholders = placeholders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != RUNNER_UTILITIES and not fullname.startswith(TRANSPORTS):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return spec
        if fullname == RUNNER_UTILITIES:
            spec.loader = _RunnerUtilities(spec.loader.name, spec.loader.path)
        else:
            spec.loader = _Transport(spec.loader.name, spec.loader.path)
            spec.loader.placeholders = self._placeholders
        return spec


class _Transport(SourceFileLoader):
    placeholders: Sequence[_Placeholders]

    def exec_module(self, module: ModuleType) -> None:
        with ExitStack() as stack:
            for one in self.placeholders:
                stack.enter_context(one)
            super().exec_module(module)


class _RunnerUtilities(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        original = module.create_transport

        async def create_transport(runner_args: Any, transport_params: dict[str, Callable[[], Any]]) -> Any:
            from pipecat.runner.types import LiveKitRunnerArguments

            if isinstance(runner_args, LiveKitRunnerArguments):
                transport_params = with_livekit(transport_params)
            return await original(runner_args, transport_params)

        create_transport.__doc__ = original.__doc__
        module.create_transport = create_transport  # type: ignore[attr-defined]


def with_livekit(transport_params: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The parameters of a bot's transports, with an entry for LiveKit made from another one where it has none.

    Taken over is what all of Pipecat's transports have in common: audio and video in and out, rates, mixer, filter.
    """
    from loguru import logger
    from pipecat.transports.base_transport import TransportParams
    from pipecat.transports.livekit.transport import LiveKitParams

    chosen = dict(transport_params)
    if "livekit" in chosen:
        return chosen
    for name in sorted(chosen, key=lambda one: PREFERRED.index(one) if one in PREFERRED else len(PREFERRED)):
        params = chosen[name]()
        if isinstance(params, TransportParams):
            common = params.model_fields_set & TransportParams.model_fields.keys()
            logger.info(f'the bot has no parameters for "livekit"; using those for "{name}"')
            chosen["livekit"] = partial(LiveKitParams, **{field: getattr(params, field) for field in common})
            break
    return chosen


def install() -> None:
    """Do this for everything that is imported from now on."""
    unused, missing = _Placeholders(UNUSED), _Placeholders(PACKAGES)
    sys.meta_path[:0] = [_Finder(unused, missing), unused]
    sys.meta_path.append(missing)
