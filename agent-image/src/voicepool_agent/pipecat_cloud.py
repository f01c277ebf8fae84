"""The modules that Pipecat Cloud's base image has for a bot: `pipecatcloud_system` and `pipecatcloud.agent`.

A bot for Pipecat Cloud adds its routes to `pipecatcloud_system.app`, and may name the classes of `pipecatcloud.agent`
in annotations. Both are made here when they are asked for, and only where no package of that name is installed.
Sources: Pipecat Cloud's "Session API" and "Session arguments".
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from fastapi import FastAPI

SYSTEM = "pipecatcloud_system"
PACKAGE = "pipecatcloud"
AGENT = "pipecatcloud.agent"


class _CloudModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds them after every other finder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname == AGENT and not isinstance(getattr(sys.modules.get(PACKAGE), "__loader__", None), _CloudModules):
            return None  # a package of that name is installed, and has no such module
        if fullname in (SYSTEM, PACKAGE, AGENT):
            return ModuleSpec(fullname, self, is_package=fullname == PACKAGE)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """See `importlib.abc.Loader`."""

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        if module.__name__ == SYSTEM:
            _fill_system(module)
        elif module.__name__ == AGENT:
            _fill_agent(module)


def _fill_system(module: ModuleType) -> None:
    from fastapi import FastAPI

    app = FastAPI()

    def add_lifespan_to_app(new_lifespan: Callable[[FastAPI], AbstractAsyncContextManager[Any]]) -> None:
        """Have the application enter one more context before the bot runs, after those that it has."""
        before = app.router.lifespan_context

        @asynccontextmanager
        async def both(application: FastAPI) -> AsyncIterator[None]:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(before(application))
                await stack.enter_async_context(new_lifespan(application))
                yield

        app.router.lifespan_context = both

    vars(module).update(app=app, add_lifespan_to_app=add_lifespan_to_app)


def _fill_agent(module: ModuleType) -> None:
    from pipecat.runner import types

    vars(module).update(
        SessionArguments=types.RunnerArguments,
        PipecatSessionArguments=types.RunnerArguments,
        DailySessionArguments=types.DailyRunnerArguments,
        WebSocketSessionArguments=types.WebSocketRunnerArguments,
        SmallWebRTCSessionArguments=types.SmallWebRTCRunnerArguments,
        MOQSessionArguments=types.MOQRunnerArguments,
    )


def install() -> None:
    """Make them available from now on."""
    sys.meta_path.append(_CloudModules())
