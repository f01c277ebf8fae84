"""When it is worth while to try again: what is known of the agents that come and of the callers who are before. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime, timedelta

from voicepool.gateway.view import is_live
from voicepool.model import BindState, PodFact, PoolFact
from voicepool.sizing import WINDOWS_SECONDS, lead_time_seconds

LEAST_SECONDS = 1
MOST_SECONDS = 60
"""Also the answer where nothing is known to come."""


def retry_after_seconds(pool: PoolFact, pods: Iterable[PodFact], *, waiting: int, now: datetime) -> int:
    """In how many whole seconds one who comes after those who wait may expect an agent: at least 1, at most 60.

    Each caller takes one agent. The first agents are those of the pods that start now, and of the pods that the operator is about to create; each is
    expected when the pool's measured lead time is over. One that is late is expected as much later as it is late already. Callers for whom these do not
    do have to wait for calls to end: as many as ended or began lately.

    Args:
        pool: whose agents.
        pods: all of the pool's, as last seen.
        waiting: how many wait already.
        now: by the clock that the pods' times are by.
    """
    pods = list(pods)
    lead_seconds = lead_time_seconds(pods, pool.spec.startup.deadline_seconds)
    live = [pod for pod in pods if is_live(pod)]
    unbound = [pod for pod in live if pod.state is BindState.WARM and not pod.deleting]
    due = [
        abs(lead_seconds - (now - pod.created_at).total_seconds())
        for pod in unbound
        # One with a reason to wait (an image that cannot be pulled, no node) is not known to come, one of a cold start comes for another caller.
        if not pod.ready and pod.waiting_reason is None and pod.cold_start is None
    ]
    to_be_created = min(pool.spec.replicas - len(unbound), pool.spec.max_pods - len(live))
    due += [lead_seconds] * max(0, to_be_created)
    due.sort()
    if waiting < len(due):
        return _bounded(due[waiting])
    rate = _agents_per_second(pods, now)
    if rate <= 0:
        return MOST_SECONDS
    return _bounded(max([(waiting + 1) / rate, *due[-1:]]))


def _agents_per_second(pods: Iterable[PodFact], now: datetime) -> float:
    """How often a call began or ended lately, whichever is more: each begin had an agent, each end makes room for one."""
    pods = list(pods)
    begun = [pod.bound_at for pod in pods if pod.bound_at is not None]
    ended = [pod.finished_at for pod in pods if pod.session is not None and pod.finished_at is not None]
    return max(
        sum(moment > now - timedelta(seconds=seconds) for moment in moments) / seconds
        for seconds in WINDOWS_SECONDS
        for moments in (begun, ended)
    )


def _bounded(seconds: float) -> int:
    return min(MOST_SECONDS, max(LEAST_SECONDS, math.ceil(seconds)))
