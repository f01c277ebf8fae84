"""What happened to sessions comes into the status once, whatever becomes of the writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tests.unit.facts import pool

from voicepool.model import PoolFact
from voicepool.session_counts import SessionCounts

KEY = ("calls", "demo")
FIVE = {"started": 5, "hits": 4, "ended": 3, "dropped": 1, "undelivered": 0}


def next_version(of: PoolFact, told: Mapping[Any, int]) -> PoolFact:
    version = str(int(of.resource_version) + 1)
    return dataclasses.replace(of, resource_version=version, status={"sessions": told})


def test_what_is_counted_is_added_to_what_the_status_says() -> None:
    counts = SessionCounts()
    counts.count(KEY, "started")
    counts.count(KEY, "hits")
    of = pool({"sessions": FIVE})
    assert counts.send(of, counts.to_send(of)) == FIVE | {"started": 6, "hits": 5}


def test_a_status_that_tells_of_no_session_begins_with_nothing() -> None:
    counts = SessionCounts()
    counts.count(KEY, "dropped")
    assert counts.send(pool(), counts.to_send(pool())) == dict.fromkeys(FIVE, 0) | {"dropped": 1}


def test_what_is_stored_is_not_sent_again_and_what_came_meanwhile_is() -> None:
    counts = SessionCounts()
    counts.count(KEY, "started")
    of = pool()
    counted = counts.to_send(of)
    told = counts.send(of, counted)
    counts.count(KEY, "ended")
    counts.stored(KEY, counted)
    assert counts.waits(KEY)
    assert counts.to_send(next_version(of, told)) == {"ended": 1}


def test_until_a_lost_answer_is_known_the_very_same_is_sent_onto_the_same_version() -> None:
    counts = SessionCounts()
    counts.count(KEY, "started")
    of = pool()
    told = counts.send(of, counts.to_send(of))
    counts.count(KEY, "started")
    assert counts.send(of, counts.to_send(of)) == told


def test_the_next_version_tells_that_a_write_without_an_answer_was_stored() -> None:
    counts = SessionCounts()
    counts.count(KEY, "started")
    of = pool()
    told = counts.send(of, counts.to_send(of))
    assert not counts.to_send(next_version(of, told))
    assert not counts.waits(KEY)


def test_the_next_version_tells_that_a_write_without_an_answer_was_not_stored() -> None:
    counts = SessionCounts()
    counts.count(KEY, "started")
    of = pool()
    counts.send(of, counts.to_send(of))
    assert counts.to_send(next_version(of, {})) == {"started": 1}


def test_a_pool_that_is_gone_and_one_that_somebody_else_counts_have_nothing_left() -> None:
    for give_up in (SessionCounts.clear, lambda counts: counts.forget(KEY)):
        counts = SessionCounts()
        counts.count(KEY, "started")
        of = pool()
        counts.send(of, counts.to_send(of))
        give_up(counts)
        assert not counts.waits(KEY)
        assert not counts.to_send(of)
