"""The informer's copy is what the API server has: after lists, watches, gaps, our own writes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.unit.api_server import ApiServer, until

from voicepool.kube import informer as informer_module
from voicepool.kube.api import PODS, Json, ServerFault, TooManyRequests, Unreachable
from voicepool.kube.informer import Informer

Change = tuple[tuple[str, str], str | None, str | None]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(informer_module, "BACKOFF_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(informer_module, "BACKOFF_MAX_SECONDS", 0.002)


@pytest.fixture
def server() -> ApiServer:
    return ApiServer()


def colour_of(obj: Json) -> str | None:
    colour: str | None = obj["metadata"].get("labels", {}).get("colour")
    return colour


def paint(server: ApiServer, name: str, colour: str | None) -> Json:
    return server.put(PODS, {"metadata": {"name": name, "labels": {"colour": colour} if colour else {}}})


class Running:
    """An informer at work, and what it told."""

    def __init__(self, copy: Informer[str]) -> None:
        self.copy = copy
        self.changes: list[Change] = []
        self.lists: list[str] = []

    def content(self) -> dict[str, str]:
        return {key[1]: entry.value for key, entry in self.copy._entries.items()}


@asynccontextmanager
async def running(server: ApiServer, **options: Any) -> AsyncIterator[Running]:
    lists: list[str] = []
    copy: Informer[str] = Informer(
        server,
        PODS,
        None,
        "",
        colour_of,
        indexes={"colour": lambda colour: colour},
        on_list=lists.append,
        jitter=random.Random(1),
        **options,
    )
    result = Running(copy)
    result.lists = lists
    copy.handlers.append(lambda key, old, new: result.changes.append((key, old, new)))
    task = asyncio.create_task(copy.run())
    try:
        await copy.synced.wait()
        yield result
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_lists_in_pages_and_then_follows(server: ApiServer) -> None:
    for number in range(5):
        paint(server, f"pod-{number}", "red")
    async with running(server, page_size=2) as seen:
        assert len(seen.copy) == 5
        assert sorted(seen.copy) == ["red"] * 5
        paint(server, "pod-9", "blue")
        server.vanish(PODS, "pod-0")
        await until(lambda: seen.copy.get("calls", "pod-9") == "blue" and len(seen.copy) == 5)
        assert seen.copy.get("calls", "pod-0") is None
        assert seen.changes[-2:] == [(("calls", "pod-9"), None, "blue"), (("calls", "pod-0"), "red", None)]
        assert seen.lists == ["start"]


async def test_the_next_page_is_asked_for_before_one_is_taken_in(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        paint(server, f"pod-{number}", "red")
    happened: list[str] = []
    list_page = server.list_page

    async def noted(*arguments: Any, **options: Any) -> Json:
        happened.append("asked")
        return await list_page(*arguments, **options)

    def convert(obj: Json) -> str | None:
        happened.append("taken in")
        return colour_of(obj)

    monkeypatch.setattr(server, "list_page", noted)
    copy: Informer[str] = Informer(server, PODS, None, "", convert, page_size=2)
    task = asyncio.create_task(copy.run())
    await copy.synced.wait()
    task.cancel()
    assert happened == ["asked", "asked", "taken in", "taken in", "taken in", "taken in"]


async def test_an_index_follows_the_changes(server: ApiServer) -> None:
    paint(server, "pod-0", "red")
    async with running(server) as seen:
        paint(server, "pod-0", "blue")
        await until(lambda: seen.copy.by("colour", "blue"))
        assert seen.copy.by("colour", "red") == []
        assert seen.copy.values_of("colour") == ["blue"]


async def test_what_vanished_during_a_gap_is_dropped(server: ApiServer) -> None:
    for name in ("pod-0", "pod-1", "pod-2"):
        paint(server, name, "red")
    async with running(server) as seen:
        server.muted = True
        server.vanish(PODS, "pod-1")
        paint(server, "pod-2", "blue")
        server.history.clear()
        server.muted = False
        server.forget_history()
        await until(lambda: seen.lists == ["start", "gone"])
        await until(lambda: seen.content() == {"pod-0": "red", "pod-2": "blue"})
        assert (("calls", "pod-1"), "red", None) in seen.changes


async def test_an_object_that_stops_to_concern_us_is_dropped(server: ApiServer) -> None:
    paint(server, "pod-0", "red")
    async with running(server) as seen:
        server.change(PODS, "pod-0", metadata={"labels": {"colour": None}})
        await until(lambda: not seen.content())


async def test_an_interrupted_watch_goes_on_from_where_it_was(server: ApiServer) -> None:
    async with running(server) as seen:
        server.failures["stream"] = [Unreachable("reset")]
        paint(server, "pod-0", "red")
        await until(lambda: seen.content() == {"pod-0": "red"})
        assert seen.lists == ["start"]


async def test_a_watch_that_fails_again_and_again_leads_to_a_list(server: ApiServer) -> None:
    async with running(server) as seen:
        server.failures["watch"] = [ServerFault("no leader"), ServerFault("no leader")]
        server.failures["stream"] = [ServerFault("no leader")]
        paint(server, "pod-0", "red")
        await until(lambda: seen.lists == ["start", "error"])
        await until(lambda: seen.content() == {"pod-0": "red"})


async def test_a_failed_list_is_repeated(server: ApiServer) -> None:
    server.failures["list"] = [Unreachable("refused"), TooManyRequests("wait", retry_after_seconds=0.001)]
    paint(server, "pod-0", "red")
    async with running(server) as seen:
        assert seen.content() == {"pod-0": "red"}
        assert seen.lists == ["start", "error", "error"]


async def test_the_answer_to_our_own_write_is_there_at_once_and_told_once(server: ApiServer) -> None:
    async with running(server) as seen:
        seen.copy.apply(paint(server, "pod-0", "red"))
        assert seen.copy.get("calls", "pod-0") == "red"
        paint(server, "pod-1", "red")
        await until(lambda: len(seen.copy) == 2)
        assert seen.changes == [(("calls", "pod-0"), None, "red"), (("calls", "pod-1"), None, "red")]


async def test_an_answer_never_replaces_something_newer(server: ApiServer) -> None:
    async with running(server) as seen:
        late = paint(server, "pod-0", "red")
        paint(server, "pod-0", "blue")
        await until(lambda: seen.content() == {"pod-0": "blue"})
        seen.copy.apply(late)
        assert seen.content() == {"pod-0": "blue"}


async def test_an_answer_does_not_bring_back_what_was_deleted_since(server: ApiServer) -> None:
    async with running(server) as seen:
        late = paint(server, "pod-0", "red")
        server.vanish(PODS, "pod-0")
        await until(lambda: len(seen.changes) == 2)
        seen.copy.apply(late)
        assert seen.content() == {}


async def test_our_own_write_outlives_a_list_that_is_older(server: ApiServer) -> None:
    copy: Informer[str] = Informer(server, PODS, None, "", colour_of)
    paint(server, "pod-0", "red")
    original = server.list_page

    async def list_page(*arguments: Any, **options: Any) -> Json:
        page = await original(*arguments, **options)
        if copy.get("calls", "pod-1") is None:
            copy.apply(paint(server, "pod-1", "blue"))
        return page

    server.list_page = list_page  # type: ignore[method-assign]
    await copy._list("start")
    assert copy.get("calls", "pod-1") == "blue"


async def test_a_fact_made_untrue_by_our_own_write_is_changed_until_a_newer_version_comes(server: ApiServer) -> None:
    stored = paint(server, "pod-0", "red")
    async with running(server) as seen:
        change: Callable[[str], str] = lambda colour: colour + ", leaving"  # noqa: E731
        seen.copy.update("calls", "pod-0", stored["metadata"]["uid"], change)
        seen.copy.update("calls", "pod-0", "another uid", change)
        assert seen.content() == {"pod-0": "red, leaving"}
        paint(server, "pod-0", "blue")
        await until(lambda: seen.content() == {"pod-0": "blue"})


async def test_what_the_api_server_does_not_know_is_forgotten(server: ApiServer) -> None:
    stored = paint(server, "pod-0", "red")
    async with running(server) as seen:
        seen.copy.forget("calls", "pod-0", "another uid")
        assert seen.content()
        seen.copy.forget("calls", "pod-0", stored["metadata"]["uid"])
        assert not seen.content()


async def test_it_lists_anew_now_and_then(server: ApiServer) -> None:
    async with running(server, relist_seconds=0.0) as seen:
        await until(lambda: "periodic" in seen.lists)


async def test_silence_is_measured(server: ApiServer) -> None:
    assert Informer(server, PODS, None, "", colour_of).silence_seconds() == float("inf")
    async with running(server) as seen:
        assert seen.copy.silence_seconds() < 60
