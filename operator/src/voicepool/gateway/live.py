"""What happens to one session, or in one pool, as it happens: from the pods' changes, and from what an agent says of itself."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from voicepool.agents import AgentStatus
from voicepool.binding import is_candidate
from voicepool.events import Kind, happenings, reason_of_vanishing
from voicepool.gateway.changes import Change, Follower
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.records import session_record, session_state
from voicepool.gateway.view import PoolKey
from voicepool.model import BindState, PodFact
from voicepool.session_api import PoolCounts, SessionRecord

COUNTS_INTERVAL_SECONDS = 1.0

_ORDER = ("bound", "accepted", "joined", "ending", "ended")
TOLD: Mapping[Kind, str] = {
    Kind.SESSION_STARTED: "session.started",
    Kind.SESSION_ENDED: "session.ended",
    Kind.SESSION_DROPPED: "session.dropped",
    Kind.SESSION_UNDELIVERED: "session.dropped",
}
"""What the events of a pool are called."""

AskAgent = Callable[[PodFact, float], Awaitable[AgentStatus | None]]
"""Asks an agent what it does; waits for so many seconds until it has joined."""


async def states(
    pod: PodFact, follower: Follower, ask: AskAgent, options: GatewayOptions
) -> AsyncGenerator[SessionRecord]:
    """A session's record whenever its state goes on: bound, accepted, joined, ending, ended. Over after the last one.

    A state that passes between two looks may be left out; none comes twice, and none after a later one.

    Args:
        pod: that carries it.
        follower: of the pod's changes, from before it was looked at.
        ask: its agent.
        options: how often.
    """
    told = -1
    changed: asyncio.Future[Change] | None = None
    asked: asyncio.Future[AgentStatus | None] | None = None
    status: AgentStatus | None = None
    try:
        if not pod.finished:
            status = await ask(pod, 0.0)
        while True:
            state = session_state(pod, status)
            if _ORDER.index(state) > told:
                told = _ORDER.index(state)
                yield session_record(pod, status)
            if state == "ended":
                return
            changed = changed or asyncio.ensure_future(follower.next())
            asked = asked or asyncio.ensure_future(_ask_later(pod, state, ask, options))
            waiting: set[asyncio.Future[Any]] = {changed, asked}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                status, asked = asked.result(), None
            if changed.done():
                (_, new), changed = changed.result(), None
                if new is None or new.uid != pod.uid:
                    yield _vanished(pod)
                    return
                pod = new
    finally:
        for future in (changed, asked):
            if future is not None:
                future.cancel()


async def _ask_later(pod: PodFact, state: str, ask: AskAgent, options: GatewayOptions) -> AgentStatus | None:
    if state in ("bound", "accepted"):
        status = await ask(pod, options.state_wait_seconds)
        if status is not None and session_state(pod, status) != state:
            return status
    # One that cannot be asked, or has nothing to wait for, is left alone for a moment.
    await asyncio.sleep(options.state_interval_seconds)
    return await ask(pod, 0.0)


def _vanished(pod: PodFact) -> SessionRecord:
    record = session_record(dataclasses.replace(pod, phase="Failed"))
    reason = reason_of_vanishing(pod)
    return record.model_copy(update={"completion_status": "dropped", "end_state": "agent_error", "reason": reason})


async def pool_news(
    key: PoolKey, pods: Callable[[], Iterable[PodFact]], follower: Follower
) -> AsyncGenerator[tuple[str, PoolCounts | SessionRecord]]:
    """A pool's counts, and again whenever they are others (once a second at most); in between, each session that started, ended or was dropped.

    Args:
        key: of the pool.
        pods: those that it has now.
        follower: of their changes.
    """
    loop = asyncio.get_running_loop()
    told = _counts(key, pods())
    yield "pool", told
    due_at: float | None = None
    while True:
        try:
            async with asyncio.timeout_at(due_at):
                old, new = await follower.next()
        except TimeoutError:
            due_at = None
            if (counts := _counts(key, pods())) != told:
                told = counts
                yield "pool", told
            continue
        due_at = due_at or loop.time() + COUNTS_INTERVAL_SECONDS
        for happening in happenings(old, new):
            if happening.kind in TOLD:
                gone = happening.kind is Kind.SESSION_DROPPED and new is None
                record = _vanished(happening.pod) if gone else session_record(happening.pod)
                yield TOLD[happening.kind], record


def _counts(key: PoolKey, pods: Iterable[PodFact]) -> PoolCounts:
    warm = starting = bound = ended = 0
    for pod in pods:
        if pod.finished:
            ended += pod.state is BindState.BOUND
        elif pod.state is BindState.BOUND:
            bound += 1
        else:
            warm += is_candidate(pod)
            starting += not is_candidate(pod)
    return PoolCounts(namespace=key[0], pool=key[1], warm=warm, starting=starting, bound=bound, ended=ended)
