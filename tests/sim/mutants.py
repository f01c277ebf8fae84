"""Bugs to be built in: a simulation that does not find them finds nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from voicepool import controller
from voicepool.kube.clock import ServerClock
from voicepool.kube.informer import Informer

from .server import Server


@contextlib.contextmanager
def _deletes_without_preconditions() -> Iterator[None]:
    honest = Server.delete

    def delete(self: Server, *arguments: Any, **options: Any) -> None:
        honest(self, *arguments, **(options | {"uid": None, "resource_version": None}))

    with patch.object(Server, "delete", delete):
        yield


@contextlib.contextmanager
def _binds_that_test_nothing() -> Iterator[None]:
    honest = Server.json_patch

    def json_patch(self: Server, resource: Any, namespace: str, name: str, operations: Any, actor: str) -> Any:
        return honest(self, resource, namespace, name, [one for one in operations if one["op"] != "test"], actor)

    with patch.object(Server, "json_patch", json_patch):
        yield


@contextlib.contextmanager
def _lists_that_do_not_replace() -> Iterator[None]:
    honest = Informer._list

    async def list_(self: Informer[Any], reason: str) -> None:
        honest_drop = self._drop
        self._drop = lambda key: None  # type: ignore[method-assign]
        try:
            await honest(self, reason)
        finally:
            self._drop = honest_drop  # type: ignore[method-assign]

    with patch.object(Informer, "_list", list_):
        yield


@contextlib.contextmanager
def _clocks_that_are_believed() -> Iterator[None]:
    with patch.object(ServerClock, "heard", lambda self, date, asked_at: None):
        yield


@contextlib.contextmanager
def _status_at_any_price() -> Iterator[None]:
    with patch.object(controller, "STATUS_INTERVAL_MAX_SECONDS", controller.STATUS_INTERVAL_SECONDS):
        yield


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "none": contextlib.nullcontext,
    "delete": _deletes_without_preconditions,
    "bind": _binds_that_test_nothing,
    "clock": _clocks_that_are_believed,
    "replace": _lists_that_do_not_replace,
    "status": _status_at_any_price,
}
