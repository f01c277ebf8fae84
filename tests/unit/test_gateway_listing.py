"""Which sessions a list shows, and that its pages are stable."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.unit.facts import NOW, bound, ended
from tests.unit.gateways import AUTHORIZED, World, world

from voicepool.gateway.errors import BadRequest
from voicepool.gateway.listing import Filter, Page, page_of
from voicepool.gateway.records import end_state
from voicepool.model import PodFact


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def begun(number: int, minutes_ago: float, **changes: Any) -> PodFact:
    return bound(number, bound_at=NOW - timedelta(minutes=minutes_ago), **changes)


def over(number: int, minutes_ago: float, **changes: Any) -> PodFact:
    return ended(number, 5, bound_at=NOW - timedelta(minutes=minutes_ago), **changes)


def summary(reason: str) -> str:
    return json.dumps({"session": "session-0", "reason": reason}, separators=(",", ":"))


def names(page: Page) -> list[str | None]:
    return [pod.session for pod in page.pods]


def test_the_newest_session_comes_first_and_warm_pods_are_none() -> None:
    pods = [begun(1, 10), begun(2, 5), over(3, 7), bound(4, session=None)]
    page = page_of(pods, Filter(), limit=10)
    assert names(page) == ["session-2", "session-3", "session-1"]
    assert (page.total, page.cursor) == (3, None)


def test_pages_by_cursor_neither_miss_nor_repeat_a_session_while_others_begin_and_end() -> None:
    pods = [begun(number, number) for number in range(1, 8)]
    first = page_of(pods, Filter(), limit=3)
    assert (names(first), first.total) == (["session-1", "session-2", "session-3"], 7)
    # One begins, one that was shown and one that was not are gone.
    later = [begun(90, 0), *(pod for pod in pods if pod.session not in ("session-2", "session-5"))]
    second = page_of(later, Filter(), limit=3, cursor=first.cursor)
    assert names(second) == ["session-4", "session-6", "session-7"]
    assert second.cursor is None


def test_sessions_that_began_in_one_moment_are_not_lost_between_two_pages() -> None:
    pods = [begun(number, 1) for number in range(5)]
    seen: list[str | None] = []
    cursor = None
    while True:
        page = page_of(pods, Filter(), limit=2, cursor=cursor)
        seen += names(page)
        cursor = page.cursor
        if cursor is None:
            break
    assert sorted(map(str, seen)) == [f"session-{number}" for number in range(5)]


def test_an_offset_leaves_the_first_ones_out() -> None:
    pods = [begun(number, number) for number in range(1, 6)]
    page = page_of(pods, Filter(), limit=2, offset=2)
    assert (names(page), page.total) == (["session-3", "session-4"], 5)
    assert names(page_of(pods, Filter(), limit=2, offset=9)) == []


@pytest.mark.parametrize("cursor", ["", "x", "%%%", "bm90IGEgY3Vyc29y", "MjAyNi0wMy0wMVQxMjowMDowMCB1aWQ"])
def test_a_cursor_of_somebody_else_is_refused(cursor: str) -> None:
    with pytest.raises(BadRequest, match="cursor"):
        page_of([begun(1, 1)], Filter(), limit=1, cursor=cursor)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Filter(state="active"), ["session-1", "session-2"]),
        (Filter(state="bound"), ["session-1"]),
        (Filter(state="ending"), ["session-2"]),
        (Filter(state="ended"), ["session-3", "session-4"]),
        (Filter(end_state="active"), ["session-1", "session-2"]),
        (Filter(end_state="completed"), ["session-3"]),
        (Filter(end_state="agent_error"), ["session-4"]),
        (Filter(created_after=NOW - timedelta(minutes=3)), ["session-1", "session-2"]),
        (Filter(created_before=NOW - timedelta(minutes=3)), ["session-4"]),
        (Filter(template="bbbbbbbb"), ["session-2"]),
        (Filter(state="ended", created_after=NOW - timedelta(minutes=3.5)), ["session-3"]),
    ],
)
def test_a_filter_lets_through_what_it_says(wanted: Filter, found: list[str]) -> None:
    pods = [
        begun(1, 1),
        begun(2, 2, deleting=True, template_hash="bbbbbbbb"),
        over(3, 3, message=summary("caller-left")),
        over(4, 4, phase="Failed", exit_code=137),
    ]
    assert names(page_of(pods, wanted, limit=10)) == found


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("caller-left", "completed"),
        ("max-duration", "completed"),
        ("cancelled", "terminated"),
        ("drained", "terminated"),
        ("not-joined", "agent_start_timeout"),
        ("stuck", "agent_error"),
        ("something new", "unknown"),
    ],
)
def test_how_a_session_ended_is_said_in_the_words_of_pipecat_clouds_client(reason: str, words: str) -> None:
    assert end_state(ended(0, 5, message=summary(reason))) == words


async def test_a_list_comes_in_pages_with_how_many_there_are(here: World) -> None:
    here.pool()
    here.pods(3)
    gateway = await here.gateway()
    started = [(await gateway.start()).json()["sessionId"] for _ in range(3)]

    async def ask(**query: Any) -> dict[str, Any]:
        answer = await gateway.client.get("/v1/agents/demo/sessions", params=query, headers=AUTHORIZED)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    first = await ask(limit=2, state="active")
    second = await ask(limit=2, state="active", cursor=first["nextCursor"])
    assert [one["sessionId"] for one in first["sessions"] + second["sessions"]] == started[::-1]
    assert (first["total_count"], second["nextCursor"]) == (3, None)
    assert (await ask(state="ended"))["sessions"] == []
    record = second["sessions"][0]
    assert (record["endState"], record["endedAt"], record["deploymentId"]) == ("active", None, "aaaaaaaa")
    assert record["botStartSeconds"] >= 0


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=9999", "state=happy", "createdAfter=2026-03-01T12:00:00", "cursor=x", "stat=ended", "offset=-1"],
)
async def test_a_question_that_makes_no_sense_is_refused_and_not_answered_with_everything(
    here: World, query: str
) -> None:
    here.pool()
    client = (await here.gateway()).client
    answer = await client.get(f"/v1/agents/demo/sessions?{query}", headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")
