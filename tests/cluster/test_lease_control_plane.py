"""Two operator processes and one Lease on a real API server: one works, the other takes over."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.cluster.test_operator_control_plane import Operator, api, namespace, until
from tests.cluster.tool import Cluster
from voicepool.kube.api import LEASES, NotFound
from voicepool.kube.client import AiohttpKubeApi

pytestmark = pytest.mark.control_plane

__all__ = ["api", "namespace"]  # fixtures

LEASE = "voicepool-operator"


class Two:
    """Two operators of one namespace."""

    def __init__(self, operators: dict[str, Operator]) -> None:
        self.operators = operators
        self.one = operators["operator-a"]

    async def holder(self) -> str:
        try:
            lease = await self.one.api.get(LEASES, self.one.namespace, LEASE)
        except NotFound:
            return ""
        return str(lease["spec"].get("holderIdentity") or "")

    async def leader(self) -> str:
        """The name of the one that holds the Lease, once there is one."""

        async def there() -> bool:
            return bool(await self.holder())

        await until(there)
        return await self.holder()

    def other(self, name: str) -> str:
        return next(other for other in self.operators if other != name)

    async def role(self, name: str) -> str:
        return str(await self.operators[name].fetch("/readyz"))

    async def seconds_until_held_by(self, name: str) -> float:
        begun = time.monotonic()

        async def held() -> bool:
            return await self.holder() == name

        await until(held)
        return time.monotonic() - begun


@pytest.fixture
async def two(control_plane: Cluster, api: AiohttpKubeApi, namespace: str, tmp_path: Path) -> AsyncIterator[Two]:
    operators = {
        name: Operator(
            control_plane,
            api,
            namespace,
            tmp_path / name,
            {
                "VOICEPOOL_LEASE_NAME": LEASE,
                "VOICEPOOL_LEASE_NAMESPACE": namespace,
                "VOICEPOOL_LEASE_IDENTITY": name,
                # One key for both: it is part of what agents are told, and so of the template's hash.
                "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE": str(tmp_path / "operator-a" / "public.pem"),
            },
        )
        for name in ("operator-a", "operator-b")
    }
    try:
        await asyncio.gather(*(operator.start() for operator in operators.values()))
        yield Two(operators)
    finally:
        for operator in operators.values():
            if operator.process is not None and operator.process.returncode is None:
                operator.process.send_signal(signal.SIGCONT)
            await operator.close()


async def creates(operator: Operator) -> float:
    """How many pods it has created, by its own metrics."""
    text = str(await operator.fetch("/metrics"))
    lines = [line for line in text.splitlines() if line.startswith("voicepool_pod_creates_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def eventually(value: Callable[[], Awaitable[object]], wanted: object) -> None:
    async def holds() -> bool:
        return await value() == wanted

    await until(holds)


async def test_both_are_ready_and_one_works(two: Two) -> None:
    leader = await two.leader()
    standby = two.other(leader)
    await eventually(lambda: two.role(leader), "ok\nrole: leader\n")
    await eventually(lambda: two.role(standby), f"ok\nrole: standby, the leader is {leader}\n")
    await two.one.apply(replicas=3)
    await two.one.fill(3)
    assert await creates(two.operators[leader]) == 3
    assert await creates(two.operators[standby]) == 0


async def test_after_a_kill_the_other_works_within_twenty_seconds(two: Two) -> None:
    leader = await two.leader()
    standby = two.other(leader)
    await two.one.apply(replicas=2)
    first, _ = await two.one.fill(2)
    await two.operators[leader].stop(signal.SIGKILL)
    await two.one.bind(first, "session-1")
    assert await two.seconds_until_held_by(standby) < 20
    await two.one.fill(2)
    assert len(await two.one.pods()) == 3
    assert (await two.one.pods())[first].session == "session-1"


async def test_after_a_clean_stop_the_other_works_within_two_seconds(two: Two) -> None:
    leader = await two.leader()
    standby = two.other(leader)
    await two.one.apply(replicas=2)
    first, _ = await two.one.fill(2)
    begun = time.monotonic()
    stopping = asyncio.create_task(two.operators[leader].stop(signal.SIGTERM))
    await two.seconds_until_held_by(standby)
    assert time.monotonic() - begun < 2
    assert await stopping == 0
    await two.one.bind(first, "session-1")
    await two.one.fill(2)
    lease = await two.one.api.get(LEASES, two.one.namespace, LEASE)
    assert lease["spec"]["leaseTransitions"] >= 1


async def test_a_frozen_leader_does_no_harm_when_it_goes_on(two: Two) -> None:
    leader = await two.leader()
    standby = two.other(leader)
    await two.one.apply(replicas=3)
    names = await two.one.fill(3)
    frozen = two.operators[leader].process
    assert frozen is not None
    frozen.send_signal(signal.SIGSTOP)
    # What it would do, if it still believed what it knew: nothing of this has happened.
    await two.one.bind(names[0], "session-1")
    await two.one.bind(names[1], "session-2")
    await two.one.patch(replicas=5)
    assert await two.seconds_until_held_by(standby) < 20
    await two.one.fill(5)
    before = sorted(await two.one.pods())
    created = await creates(two.operators[standby])
    frozen.send_signal(signal.SIGCONT)
    await eventually(lambda: two.role(leader), f"ok\nrole: standby, the leader is {standby}\n")
    pods = await two.one.pods()
    assert sorted(pods) == before
    assert {pods[names[0]].session, pods[names[1]].session} == {"session-1", "session-2"}
    assert await two.holder() == standby
    assert await creates(two.operators[standby]) == created == 4
    assert await creates(two.operators[leader]) == 3


async def test_a_lease_that_is_lost_is_won_again(two: Two) -> None:
    leader = await two.leader()
    standby = two.other(leader)
    await two.operators[standby].stop(signal.SIGTERM)
    await two.one.api.merge_patch(
        LEASES, two.one.namespace, LEASE, {"spec": {"holderIdentity": "a person", "leaseDurationSeconds": 3}}
    )
    await eventually(lambda: two.role(leader), "ok\nrole: standby, the leader is a person\n")
    await two.one.apply(replicas=2)
    await two.seconds_until_held_by(leader)
    await two.one.fill(2)
