"""Storms: callers come at 20 a second while everything around their pool is shaken. No call may be lost, and the audit log is the witness.

Operator and gateways are real processes with the chart's rights; kubelet, agents, LiveKit and callers are played. How long a storm lasts is in
VOICEPOOL_STORM_SECONDS (6), how long a converged pool is watched in VOICEPOOL_QUIET_SECONDS (30).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.chaos.etcd import compact
from tests.cluster.chaos.judge import WRITES_OF_A_SESSION, FaultKind, writes_without_cause
from tests.cluster.chaos.processes import Process
from tests.cluster.chaos.stage import (
    CALLS_PER_SECOND,
    PARALLEL_WRITES,
    REPLICAS,
    SETTLE_SECONDS,
    Accounts,
    Stage,
    accounts,
    running,
    stage,
    until,
)
from tests.cluster.tool import Cluster
from tests.conftest import Show
from voicepool.recorder import INTERVAL_SECONDS

pytestmark = pytest.mark.control_plane

STORM_SECONDS = float(os.environ.get("VOICEPOOL_STORM_SECONDS") or 6)
QUIET_SECONDS = float(os.environ.get("VOICEPOOL_QUIET_SECONDS") or 30)
REFILL_SECONDS = 10.0
"""Generous: the machine may be busy with other things. What was reached is printed."""
FAIL_OVER_SECONDS = 20.0
"""What the Lease of an operator that was killed in the last moment of a storm may cost on top."""


@pytest.fixture
def acts(control_plane: Cluster, tmp_path: Path) -> Iterator[Accounts]:
    with accounts(control_plane, tmp_path) as made:
        yield made


async def scale_flips(here: Stage, seconds: float) -> None:
    """`/scale` goes between 0 and N every 200 ms."""
    deadline = asyncio.get_running_loop().time() + seconds
    for replicas in itertools.cycle((0, REPLICAS)):
        if asyncio.get_running_loop().time() > deadline:
            return
        await here.scale(replicas)
        await asyncio.sleep(0.2)


async def releases(here: Stage, seconds: float) -> None:
    """The template changes every second."""
    deadline = asyncio.get_running_loop().time() + seconds
    for number in itertools.count():
        if asyncio.get_running_loop().time() > deadline:
            return
        await here.build(number)
        await asyncio.sleep(1)


async def kills(here: Stage, seconds: float) -> None:
    """Operator and gateways get SIGKILL in turns, and are started again at once."""

    async def kill(victims: list[Process]) -> None:
        await asyncio.gather(*(victim.kill() for victim in victims))
        await asyncio.gather(*(victim.ready() for victim in victims))
        await asyncio.sleep(0.5)

    operator, (first, second) = here.operators[0], here.gateways
    deadline = asyncio.get_running_loop().time() + seconds
    for victims in itertools.cycle(([operator], [first], [operator, second], [first, second])):
        if asyncio.get_running_loop().time() > deadline:
            return
        await kill(victims)


async def freezes(here: Stage, seconds: float) -> None:
    """The operator that leads and then a gateway get SIGSTOP, and go on later; a minute is long enough to lose the Lease."""
    leader = here.operators[0]
    for operator in here.operators:
        if "role: leader" in (await operator.ask("/readyz") or ""):
            leader = operator
    for victim in (leader, here.gateways[0]):
        victim.freeze()
        await asyncio.sleep(seconds * 0.35)
        victim.go_on()
        await asyncio.sleep(seconds * 0.1)
    await asyncio.gather(*(process.ready() for process in here.processes))


async def api_restarts(here: Stage, seconds: float) -> None:
    """The API server is stopped and started again, every 15 seconds."""
    for _ in range(max(1, int(seconds / 15))):
        await asyncio.sleep(min(4.0, seconds / 3))
        await asyncio.to_thread(here.cluster.restart, "kube-apiserver")
        await asyncio.to_thread(here.cluster.wait_for_api)
        await asyncio.sleep(min(4.0, seconds / 3))


async def compactions(here: Stage, seconds: float) -> None:
    """The history of etcd is thrown away twice a second; every tenth time the API server loses its own, too, and watches have to begin anew."""
    address = here.cluster.etcd_address
    for number in range(1, int(seconds / 0.5)):
        await compact(here.http, address)
        await asyncio.sleep(0.5)
        if number % 10 == 0:
            await asyncio.to_thread(here.cluster.restart, "kube-apiserver")
            await asyncio.to_thread(here.cluster.wait_for_api)


@dataclass(frozen=True, slots=True)
class Storm:
    """What is done, and what it may leave behind.

    Attributes:
        rage: does it, for a number of seconds.
        operators: how many there are; with two, one leads.
        overshoot: pods that may pass `maxPods`: the creates that a writer with an old view may have under way, one batch of them for each such writer.
        may_strand: a gateway may die between a bind and its delivery.
        may_lose_the_leader: the operator that works may be gone, or stand still, when the storm is over.
        may_end: kopf ends the operator on some errors of its watch, so that Kubernetes starts it again.
    """

    rage: Callable[[Stage, float], Awaitable[None]]
    operators: int = 1
    overshoot: int = 0
    may_strand: bool = False
    may_lose_the_leader: bool = False
    may_end: bool = False


STORMS = [
    Storm(scale_flips),
    Storm(releases),
    Storm(kills, overshoot=PARALLEL_WRITES, may_strand=True, may_lose_the_leader=True),
    Storm(freezes, operators=2, overshoot=PARALLEL_WRITES, may_strand=True, may_lose_the_leader=True),
    Storm(api_restarts, overshoot=PARALLEL_WRITES, may_end=True),
    Storm(compactions, overshoot=PARALLEL_WRITES, may_end=True),
]


async def refilled(here: Stage) -> tuple[float, float]:
    """Wait until the pool is full: when the last caller had an agent, and how long after that. While somebody waits no pool is full."""
    loop = asyncio.get_running_loop()
    calm = loop.time()

    async def full() -> bool:
        return here.full()

    await until(full, SETTLE_SECONDS)
    last = max(calm, here.agents.last_accepted_at)
    return last - calm, loop.time() - last


@pytest.mark.parametrize("storm", STORMS, ids=[storm.rage.__name__ for storm in STORMS])
async def test_no_call_is_lost_in_a_storm(
    control_plane: Cluster, acts: Accounts, tmp_path: Path, show: Show, storm: Storm
) -> None:
    async with stage(control_plane, acts, tmp_path, storm.operators) as here:
        async with running(here.callers.keep_calling(CALLS_PER_SECOND)) as calling:
            await storm.rage(here, STORM_SECONDS)
            assert not calling.done()
        await here.scale(REPLICAS)
        last_seconds, refill_seconds = await refilled(here)
        await here.settle()
        stranded = [pod.name for pod in here.agents.undelivered()]
        verdict = here.verdict(storm.overshoot)
        callers = here.callers
        show(f"{callers.asked} callers, {len(callers.answered)} answered, others: {dict(callers.failures)}")
        show(verdict.words())
        show(f"last caller served {last_seconds:.2f} s after the storm, full {refill_seconds:.2f} s later")
        show(f"stranded: {len(stranded)}; told: {', '.join(sorted(here.told))}")
        ended = [code for process in here.processes for code in process.own_ends]
        show(f"processes that ended by themselves: {ended}")

        assert refill_seconds < REFILL_SECONDS + (FAIL_OVER_SECONDS if storm.may_lose_the_leader else 0.0)
        assert verdict.faults == ()
        assert here.agents.killed() == []
        assert here.agents.errors == []
        assert [session for session in callers.answered if not here.agents.with_session(session)] == []
        assert verdict.calls == verdict.ended >= len(callers.answered) > 0
        assert storm.may_strand or stranded == []
        assert storm.may_end or ended == []


async def test_a_converged_pool_is_not_written_to(
    control_plane: Cluster, acts: Accounts, tmp_path: Path, show: Show
) -> None:
    async with stage(control_plane, acts, tmp_path, operators=2) as here:
        # One call, so that the pool has been at work before it rests.
        async with running(here.callers.keep_calling(CALLS_PER_SECOND)):
            await asyncio.sleep(1)
        await here.callers.finish()
        await here.settle()
        # What was told meanwhile is still to be written: Events, which are gathered for a while, and a last status.
        await asyncio.sleep(INTERVAL_SECONDS + 2)
        here.verdict(0)
        begun = len(here.audit.writes)
        await asyncio.sleep(QUIET_SECONDS)
        verdict = here.verdict(0)
        since = here.audit.writes[begun:]
        ours = frozenset(acts.name(role) for role in ("operator", "gateway"))
        renewals = sum(write.resource == "leases" and write.actor in ours for write in since)
        show(f"in {QUIET_SECONDS:.0f} s {renewals} renewals of the Lease; before: {verdict.words()}")
        assert writes_without_cause(since, ours) == []
        assert renewals > 0
        assert verdict.faults == ()
        assert verdict.count(FaultKind.TOO_MANY_WRITES) == 0
        assert verdict.most_writes == WRITES_OF_A_SESSION
