"""Whose turn it is among those who wait for one pool."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from voicepool.gateway.fair_queue import FairQueue


@dataclass(eq=False)
class One:
    caller: str
    since: float = 0.0


def served(queue: FairQueue[One]) -> list[One]:
    order = []
    while (waiter := queue.first()) is not None:
        queue.served(waiter)
        order.append(waiter)
    return order


def test_a_thousand_callers_of_one_key_do_not_hold_up_the_one_of_another() -> None:
    queue: FairQueue[One] = FairQueue()
    for number in range(1000):
        queue.add(One("crowd", number))
    lonely = One("lonely", 1000.0)
    queue.add(lonely)
    assert served(queue).index(lonely) == 1


def test_one_who_lost_what_he_was_given_is_next() -> None:
    queue: FairQueue[One] = FairQueue()
    first, second, other = One("a", 1.0), One("a", 2.0), One("b", 1.5)
    for waiter in (first, second, other):
        queue.add(waiter)
    queue.served(first)
    queue.add(first, again=True)
    assert served(queue) == [first, other, second]


def test_one_who_is_not_there_may_be_removed() -> None:
    queue: FairQueue[One] = FairQueue()
    queue.remove(One("a"))
    queue.add(One("a"))
    queue.remove(One("a"))
    assert len(queue) == 1


@given(st.lists(st.floats(0, 1e6), max_size=40))
def test_one_key_alone_is_first_come_first_served(times: list[float]) -> None:
    queue: FairQueue[One] = FairQueue()
    waiters = [One("only", since) for since in times]
    for waiter in waiters:
        queue.add(waiter)
    assert served(queue) == sorted(waiters, key=lambda waiter: waiter.since)


STEPS = st.lists(
    st.tuples(st.sampled_from(["come", "serve", "serve", "leave"]), st.sampled_from("abcd"), st.integers(0, 99))
)


@given(STEPS)
def test_nobody_starves_nobody_is_idle_and_a_keys_callers_keep_their_order(steps: list[tuple[str, str, int]]) -> None:
    queue: FairQueue[One] = FairQueue()
    waiting: list[One] = []
    since_turn: dict[str, dict[str, int]] = {}
    """Of each key that waits: how often each other key was served since its last turn."""
    for now, (step, caller, number) in enumerate(steps):
        if step == "come":
            waiter = One(caller, now)
            queue.add(waiter)
            waiting.append(waiter)
            since_turn.setdefault(caller, {})
        elif step == "leave" and waiting:
            gone = waiting.pop(number % len(waiting))
            queue.remove(gone)
        elif step == "serve" and waiting:
            next_one = queue.first()
            assert next_one is not None
            assert next_one is min(
                (waiter for waiter in waiting if waiter.caller == next_one.caller), key=lambda waiter: waiter.since
            )
            queue.served(next_one)
            waiting.remove(next_one)
            for other, counts in since_turn.items():
                if other == next_one.caller:
                    counts.clear()
                else:
                    counts[next_one.caller] = counts.get(next_one.caller, 0) + 1
                    assert counts[next_one.caller] <= 1
        for key in list(since_turn):
            if all(waiter.caller != key for waiter in waiting):
                del since_turn[key]
        assert len(queue) == len(list(queue)) == len(waiting)
        assert (queue.first() is None) == (not waiting)
