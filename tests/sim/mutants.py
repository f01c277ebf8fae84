"""Bugs to be built in: a simulation that does not find them finds nothing."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from voicepool import controller, plan, status_keeper
from voicepool.budgets import BudgetKeeper
from voicepool.controller import Controller
from voicepool.gateway.allocator import Allocator
from voicepool.gateway.binder import Binder
from voicepool.kube import convert
from voicepool.kube.clock import ServerClock
from voicepool.kube.informer import Informer
from voicepool.kube.lease import Election

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
    with patch.object(status_keeper, "STATUS_INTERVAL_MAX_SECONDS", status_keeper.STATUS_INTERVAL_SECONDS):
        yield


def _without(owner: Any, name: str, honest: str, wrong: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A function in which some words are replaced by others: a fix that was never made.

    Args:
        owner: the class or module whose attribute it is.
        name: of the function.
        honest: words that stand in its source exactly once, so that no later change makes a mutant of nothing.
        wrong: what stands in their place.
    """

    @contextlib.contextmanager
    def mutant() -> Iterator[None]:
        function = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(honest) == 1, f"{name} is not what it was: {honest!r} is not in it once"
        made: dict[str, Any] = {}
        code = "from __future__ import annotations\n" + source.replace(honest, wrong)
        exec(compile(code, f"<{name} with a bug>", "exec"), function.__globals__, made)  # noqa: S102
        with patch.object(owner, name, made[name]):
            yield

    return mutant


_CHANGED = (
    """            await self._read_pod((namespace, item.name), item.uid)
            self._add((namespace, pool))
""",
    "",
)
_PAGE = (
    """            page = await coming
""",
    """            try:
                page = await coming
            except KubeApiError:
                return
""",
)

MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "none": contextlib.nullcontext,
    "delete": _deletes_without_preconditions,
    "bind": _binds_that_test_nothing,
    "bind of another": _without(Binder, "_ours", " or bound_by != self._identity", ""),
    "changed pod": _without(Controller, "_delete_all", *_CHANGED),
    "clock": _clocks_that_are_believed,
    "evicted call": _without(
        controller, "drain", "not pod.finished and pod.drain", "not pod.finished and not pod.deleting and pod.drain"
    ),
    "failed cold start": _without(plan, "_victims", "sum(not pod.finished for pod in groups.cold)", "len(groups.cold)"),
    "late pod": _without(
        controller, "plan", "if wanted and failure is not None and f", "if created and failure is not None and f"
    ),
    "lease": _without(
        Election, "_round", "asked_at + self._times.renew_deadline_seconds", "asked_at + MAX_DURATION_SECONDS"
    ),
    "name": _without(Controller, "reconcile", "UsedNumbers.up_to(names) if known is None else known", "UsedNumbers()"),
    "page": _without(Informer, "_pages", *_PAGE),
    "replace": _lists_that_do_not_replace,
    "status": _status_at_any_price,
    "taken over": _without(
        controller, "taken_over", "return [pod for pod in pods if", "return [pod for pod in pods if False and"
    ),
    "silent node": _without(convert, "_is_cut_off", 'get("status") == "True")', 'get("status") == "")'),
    "stale budget": _without(
        BudgetKeeper, "keep", "self._copy.apply(await self._api.get(BUDGETS, namespace, name))", "pass"
    ),
    "unseen call": _without(Controller, "_clean_up_after", "if await self._has_calls(key):", "if False:"),
    "waiter": _without(Allocator, "_serve", "if waiter.future.done():", "if False:"),
}
