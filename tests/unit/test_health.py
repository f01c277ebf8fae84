"""What the probes answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from voicepool.health import HealthFacts, HealthLimits, liveness, readiness

LIMITS = HealthLimits(watch_silence_seconds=90, resync_seconds=60)
FINE = HealthFacts(
    pods_listed=True, pods_silence_seconds=20, pools_listed=True, pools_age_seconds=30, running_seconds=3600
)
NEVER = float("inf")
STARTING = HealthFacts(
    pods_listed=False, pods_silence_seconds=NEVER, pools_listed=False, pools_age_seconds=NEVER, running_seconds=2
)


def test_a_synced_process_is_ready_and_says_which_one_it_is() -> None:
    assert readiness(FINE, LIMITS).text() == "ok\nrole: leader\n"
    standby = replace(FINE, leading=False, holder="voicepool-operator-b")
    assert readiness(standby, LIMITS).text() == "ok\nrole: standby, the leader is voicepool-operator-b\n"
    assert "there is no leader" in readiness(replace(FINE, leading=False), LIMITS).text()


def test_a_process_that_starts_is_not_ready_and_is_live() -> None:
    assert readiness(STARTING, LIMITS).words == (
        "the pods have not been listed yet",
        "the pools have not been listed yet",
    )
    assert liveness(STARTING, LIMITS).good


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(FINE, pods_silence_seconds=181), "nothing has been heard of the pods for 181 s"),
        (replace(FINE, pools_age_seconds=181), "the pools were listed 181 s ago"),
        (
            replace(FINE, lease_silence_seconds=NEVER, lease_error="leases is forbidden"),
            "the Lease cannot be read or written: leases is forbidden",
        ),
    ],
)
def test_what_is_old_makes_it_not_ready_but_not_dead(facts: HealthFacts, words: str) -> None:
    assert (readiness(facts, LIMITS).good, readiness(facts, LIMITS).words) == (False, (words,))
    assert liveness(facts, LIMITS).good


def test_one_broken_watch_and_a_quiet_next_one_are_ordinary() -> None:
    assert readiness(replace(FINE, pods_silence_seconds=90 + 60), LIMITS).good


def test_an_api_server_that_is_away_for_ten_minutes_is_no_reason_to_start_again() -> None:
    away = replace(FINE, pods_silence_seconds=600, pools_age_seconds=600, lease_silence_seconds=600)
    assert liveness(away, LIMITS).good


def test_a_watch_that_stays_silent_is_a_reason_to_start_again() -> None:
    verdict = liveness(replace(FINE, pods_silence_seconds=901), LIMITS)
    assert (verdict.good, verdict.words) == (False, ("nothing has been heard of the pods for 901 s",))


def test_pools_that_are_not_listed_any_more_are_a_reason_to_start_again() -> None:
    assert not liveness(replace(FINE, pools_age_seconds=901), LIMITS).good


def test_a_watch_of_pools_that_does_not_tell_what_lists_show_is_a_reason_to_start_again() -> None:
    assert liveness(replace(FINE, pools_owed_seconds=180), LIMITS).good
    verdict = liveness(replace(FINE, pools_owed_seconds=181), LIMITS)
    assert (verdict.good, verdict.words) == (
        False,
        ("a list showed a pool 181 s ago of which the watch has told nothing",),
    )


def test_a_process_that_never_got_anywhere_is_started_again_in_the_end() -> None:
    assert not liveness(replace(STARTING, running_seconds=901), LIMITS).good
