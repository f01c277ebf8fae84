"""What the client of the session API decides without a gateway: when it tries again, and what it calls an error."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from tests.unit.clocks import Clock

from voicepool import gateway
from voicepool.client import errors
from voicepool.client.attempts import LONGEST_PAUSE_SECONDS, SILENCE_SECONDS, Attempts
from voicepool.client.calls import Call
from voicepool.client.errors import BY_CODE, Refused, TryAgainLater, VoicepoolError, refused
from voicepool.client.streams import Following, LogStream
from voicepool.gateway import errors as gateway_errors
from voicepool.gateway.errors import GatewayError
from voicepool.session_api import LogLine

T = TypeVar("T")

ELSEWHERE = {
    "ROOM_ENDED": "nobody is told",
    "CALLER_GONE": "nobody is there to be told",
    "INVALID_WEBHOOK": "LiveKit's server is told",
}
"""Codes of the gateway that are no answer to this client."""
OTHER_NAMES = {
    "GatewayError": "GatewayFailed",
    "BadRequest": "InvalidRequest",
    "Unauthenticated": "Unauthorized",
    "NotAllowed": "PoolNotAllowed",
    "NotJoined": "AgentNotJoined",
}
"""Where a caller's word for an error is another one than the gateway's."""


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


def attempts(clock: Clock, *, timeout_seconds: float = 60, repeatable: bool = True, share: float = 0.0) -> Attempts:
    return Attempts(timeout_seconds, repeatable=repeatable, monotonic=clock, random_share=lambda: share)


def no_warm_agent(retry_after_seconds: float | None) -> VoicepoolError:
    return errors.NoWarmAgent("None.", status=503, code="NO_WARM_AGENT", retry_after_seconds=retry_after_seconds)


# When it tries again


def test_it_waits_for_as_long_as_the_gateway_says_and_never_less(clock: Clock) -> None:
    assert attempts(clock).pause_seconds(no_warm_agent(7)) == 7
    assert attempts(clock, share=1.0).pause_seconds(no_warm_agent(10)) == pytest.approx(11)


def test_pauses_double_where_nobody_says_how_long(clock: Clock) -> None:
    tries = attempts(clock)
    pauses = [tries.pause_seconds(errors.ConnectionFailed("Away.")) for _ in range(8)]
    assert pauses == [0.25, 0.5, 1, 2, 4, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS]
    assert tries.made == 9


def test_a_pause_that_would_lead_past_the_deadline_is_not_begun(clock: Clock) -> None:
    tries = attempts(clock, timeout_seconds=10)
    clock.now += 4
    assert tries.pause_seconds(no_warm_agent(6)) is None
    assert tries.pause_seconds(no_warm_agent(5)) == 5


@pytest.mark.parametrize(
    "error",
    [
        errors.Timeout("Up."),
        errors.Unauthorized("No.", status=401, retry_after_seconds=1),
        errors.AgentNotJoined("Not yet.", status=504, retry_after_seconds=2),
        no_warm_agent(None),
        errors.NotUnderstood("A page.", status=200),
    ],
)
def test_what_does_not_pass_is_not_tried_again(clock: Clock, error: VoicepoolError) -> None:
    assert attempts(clock).pause_seconds(error) is None


def test_what_cannot_be_repeated_is_never_repeated(clock: Clock) -> None:
    assert attempts(clock, repeatable=False).pause_seconds(no_warm_agent(1)) is None
    assert attempts(clock, repeatable=False).pause_seconds(errors.ConnectionFailed("Away.")) is None


def test_each_step_of_a_request_may_take_what_is_left_of_the_whole(clock: Clock) -> None:
    left = attempts(clock, timeout_seconds=10).left
    clock.now += 4
    assert dict(left) == {"connect": 6, "read": 6, "write": 6, "pool": 6}
    clock.now += 100
    assert left["read"] > 0
    left.streaming = True
    assert left["read"] == SILENCE_SECONDS


# Streams


def following(clock: Clock) -> Following[LogLine]:
    def made(call: Call[None]) -> Attempts:
        return attempts(clock, timeout_seconds=10)

    return Following(LogStream("demo", "one", 10), made, clock)


def heard(it: Following[LogLine]) -> None:
    it.take("log", '{"timestamp": "", "log": "hello"}', "")


@pytest.mark.parametrize(
    ("after_seconds", "what"), [(1, heard), (LONGEST_PAUSE_SECONDS + 1, lambda it: None)], ids=["news", "long silence"]
)
def test_a_stream_that_was_good_for_something_has_all_the_time_again(
    clock: Clock, after_seconds: float, what: Callable[[Following[LogLine]], None]
) -> None:
    it = following(clock)
    for _ in range(20):
        it.connected()
        clock.now += after_seconds
        what(it)
        assert it.pause_seconds(errors.StreamBroken("Broke.")) == 0.25


def test_a_stream_that_breaks_at_once_each_time_is_given_up(clock: Clock) -> None:
    it = following(clock)
    for _ in range(20):
        it.connected()
        pause_seconds = it.pause_seconds(errors.StreamBroken("Broke."))
        if pause_seconds is None:
            break
        clock.now += pause_seconds
    assert pause_seconds is None
    assert clock.now < 110


# What an error is called


def subclasses(root: type[T]) -> Iterator[type[T]]:
    """A class and all below it, as a tree is read."""
    yield root
    for one in root.__subclasses__():
        yield from subclasses(one)


@functools.cache
def classes_of_codes() -> dict[str, set[str]]:
    """The gateway's codes, and the classes that say them."""
    found: dict[str, set[str]] = {}
    for one in subclasses(GatewayError):
        found.setdefault(one.code, set()).add(one.__name__)
    for file in Path(gateway.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        assert isinstance(node.func, ast.Name)
                        found.setdefault(str(keyword.value.value), set()).add(node.func.id)
    for code, _ in gateway_errors._WORDS.values():
        found.setdefault(code, set()).add("RouteNotFound")
    return found


def test_each_code_of_the_gateway_is_an_error_of_the_client_and_no_other() -> None:
    assert set(BY_CODE) | set(ELSEWHERE) == set(classes_of_codes())
    assert not set(BY_CODE) & set(ELSEWHERE)


def test_errors_are_called_as_the_gateway_calls_them() -> None:
    for code, kind in BY_CODE.items():
        theirs = {OTHER_NAMES.get(name, name) for name in classes_of_codes()[code]}
        assert kind.__name__ in theirs or code == "LIVEKIT_NOT_CONFIGURED", (code, theirs)


def test_what_the_gateway_says_passes_is_tried_again() -> None:
    passing = {one.code for one in subclasses(GatewayError) if one.status in (429, 503, 504)}
    assert {code for code, kind in BY_CODE.items() if issubclass(kind, TryAgainLater)} == passing - {"AGENT_NOT_JOINED"}


@pytest.mark.parametrize(
    ("status", "kind"), [(418, Refused), (429, TryAgainLater), (503, TryAgainLater), (500, Refused), (409, Refused)]
)
def test_a_code_of_a_newer_gateway_is_told_by_its_status(status: int, kind: type[Refused]) -> None:
    assert refused("SOMETHING_NEW", status) is kind


def test_the_tree_in_the_documentation_is_the_tree() -> None:
    assert errors.__doc__ is not None
    shown = re.findall(r"^[ |]*(?:\+-- )?([A-Z]\w+)(?:  +\S.*)?$", errors.__doc__.partition("\n\n")[2], re.MULTILINE)
    assert shown == [one.__name__ for one in subclasses(VoicepoolError)]
    for code, kind in BY_CODE.items():
        assert re.search(rf"\+-- {kind.__name__} .*\b{code}\b", errors.__doc__), code


def test_each_error_says_what_to_do_in_one_sentence() -> None:
    for one in subclasses(VoicepoolError):
        if one not in (VoicepoolError, Refused):
            assert re.fullmatch(r"[a-z].*\.", one.what_to_do), one
    assert str(no_warm_agent(1)) == f"None. (503 NO_WARM_AGENT) What to do: {errors.NoWarmAgent.what_to_do}"
    assert str(errors.Refused("None.", status=418, code="NEW")) == "None. (418 NEW)"
