"""The thread that watches the event loop: when it loses patience, and what it names."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest

from voicepool_agent.watchdog import TICK_SECONDS, Patience, Watchdog, place_of


def ticks(patience: Patience, number: int, beats: int = 1) -> list[str | None]:
    return [patience.tick(beats) for _ in range(number)]


def per_second(seconds: float) -> int:
    return round(seconds / TICK_SECONDS)


def test_a_loop_that_comes_round_is_never_blamed() -> None:
    patience = Patience(lambda: 1.0)
    assert [patience.tick(beats) for beats in range(100)] == [None] * 100


def test_a_loop_that_is_held_up_is_noticed_once_and_given_up_when_the_limit_is_over() -> None:
    patience = Patience(lambda: 20.0)
    verdicts = ticks(patience, 1 + per_second(20))
    assert verdicts.count("notice") == 1
    assert verdicts.index("notice") == per_second(2)
    assert verdicts[-1] == "give up"
    assert verdicts.count("give up") == 1


def test_a_loop_that_comes_round_again_is_given_all_the_time_again() -> None:
    patience = Patience(lambda: 20.0)
    assert "give up" not in ticks(patience, per_second(19), beats=1) + ticks(patience, per_second(19), beats=2)


def test_the_limit_is_that_of_the_moment() -> None:
    limit = 60.0
    patience = Patience(lambda: limit)
    assert "give up" not in ticks(patience, per_second(30))
    limit = 20.0
    assert patience.tick(1) == "give up"


async def test_the_line_that_holds_up_the_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed: list[str] = []
    given_up = threading.Event()

    def give_up(_seconds: float, place: str) -> None:
        noticed.append(place)
        given_up.set()

    Watchdog(lambda: 0.5, noticed.append, give_up, Path(__file__).parent).start()
    await asyncio.sleep(0)
    line = traceback.extract_stack(limit=1)[0].lineno
    given_up.wait(timeout=30)  # holds up the loop, as a bot would
    assert noticed == [f"line {(line or 0) + 1} of {Path(__file__).name}"] * 2


@pytest.mark.parametrize(
    ("hang", "live"),
    [
        ("sum(range(10**12))", "itertools.repeat(True)"),
        ("await asyncio.sleep(60)", "itertools.chain([True], itertools.repeat(False))"),
    ],
    ids=["the interpreter's lock is kept", "it does not come to its end"],
)
def test_an_agent_that_hangs_where_no_thread_of_its_own_can_help_is_ended(hang: str, live: str) -> None:
    program = f"""
import asyncio, itertools
from voicepool_agent.watchdog import Watchdog

live = {live}

async def hang():
    Watchdog(lambda: 0.5, print, print, None, lambda: next(live), last_resort_seconds=0.5).start()
    await asyncio.sleep(0)
    {hang}

asyncio.run(hang())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Timeout (0:00:01)!")


def test_without_a_line_of_the_bots_own_the_innermost_is_named() -> None:
    stack = traceback.extract_stack()
    assert (
        place_of(stack, None)
        == place_of(stack, Path("/nowhere"))
        == f"line {stack[-1].lineno} of {Path(__file__).name}"
    )


async def test_the_thread_ends_with_its_loop() -> None:
    before = set(threading.enumerate())

    async def watched() -> set[threading.Thread]:
        Watchdog(lambda: 60.0, print, print, None).start()
        return {one for one in threading.enumerate() if one not in before and one.name == "watchdog"}

    (thread,) = await asyncio.to_thread(asyncio.run, watched())
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
