"""The keyed queue: no key twice, no change lost, delays and back-off per key."""

from __future__ import annotations

import asyncio
import random

import uvloop

from voicepool.queue import KeyedQueue


class Steady(random.Random):
    """Jitter that is always the same."""

    def uniform(self, a: float, b: float) -> float:
        return 1.0


async def test_a_key_is_handed_out_once_however_often_it_is_added() -> None:
    queue: KeyedQueue[str] = KeyedQueue()
    for key in ("a", "b", "a", "a"):
        queue.add(key)
    assert len(queue) == 2
    assert [await queue.get(), await queue.get()] == ["a", "b"]


async def test_a_key_added_while_somebody_works_on_it_comes_again_afterwards_and_not_before() -> None:
    queue: KeyedQueue[str] = KeyedQueue()
    queue.add("a")
    key = await queue.get()
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    queue.done(key)
    assert await queue.get() == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_a_key_that_comes_again_and_again_waits_behind_the_others() -> None:
    queue: KeyedQueue[str] = KeyedQueue()
    for key in ("busy", "a", "b"):
        queue.add(key)
    handed_out = []
    for _ in range(4):
        key = await queue.get()
        queue.add("busy")
        queue.done(key)
        handed_out.append(key)
    assert handed_out == ["busy", "a", "b", "busy"]


async def test_a_worker_waits_until_there_is_something() -> None:
    queue: KeyedQueue[str] = KeyedQueue()
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await worker == "a"


async def test_of_several_delays_the_shortest_counts() -> None:
    queue: KeyedQueue[str] = KeyedQueue()
    queue.add_after("a", 3600)
    queue.add_after("a", 0.001)
    queue.add_after("a", 3600)
    assert await queue.get() == "a"
    queue.done("a")
    queue.clear()


async def test_failures_in_a_row_wait_longer_and_longer_until_one_succeeds() -> None:
    queue: KeyedQueue[str] = KeyedQueue(Steady())
    assert [queue.retry("a") for _ in range(4)] == [0.1, 0.2, 0.4, 0.8]
    assert queue.retry("b") == 0.1
    assert queue.retry("b", at_least_seconds=7) == 7
    for _ in range(30):
        queue.retry("a")
    assert queue.retry("a") == 30
    queue.succeeded("a")
    assert queue.retry("a") == 0.1
    queue.clear()


def test_a_delay_of_nothing_and_another_one_on_the_event_loop_of_the_process() -> None:
    async def first_key() -> str:
        queue: KeyedQueue[str] = KeyedQueue()
        queue.add_after("a", 0)
        queue.add_after("a", 1)
        return await queue.get()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(first_key()) == "a"
