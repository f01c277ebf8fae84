"""A pod whose agent never got its session is found and deleted, and no other; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.api_server import ApiServer
from tests.unit.test_lease import virtual

from voicepool.agents import AgentStatus
from voicepool.binding import DELIVERY_DEADLINE_SECONDS
from voicepool.controller import Controller, ControllerSettings
from voicepool.copies import PoolStore, pod_informer
from voicepool.gateway.options import GatewayOptions
from voicepool.kube.api import EVENTS, PODS, POOLS, Json, ServerFault
from voicepool.kube.convert import pool_from_json
from voicepool.metrics import OperatorMetrics
from voicepool.model import PodFact
from voicepool.podspec import PodSettings
from voicepool.reaper import ASK_AFTER_SECONDS
from voicepool.recorder import EventRecorder

POOL = "demo"


class Here:
    """A pool without a warm target, an operator, and agents that say what a test wants."""

    def __init__(self) -> None:
        self.server = ApiServer()
        self.metrics = OperatorMetrics(CollectorRegistry())
        self.says: dict[str, str | None] = {}
        """State by pod name; None: it cannot be asked."""
        self.asked: list[str] = []
        self.before_answer: Callable[[str], None] = lambda name: None

    async def ask(self, pod: PodFact) -> AgentStatus | None:
        self.asked.append(pod.name)
        self.before_answer(pod.name)
        state = self.says.get(pod.name)
        return None if state is None else AgentStatus(state, None if state == "parked" else pod.session, pod.uid)

    def bind(self, name: str) -> None:
        labels = {"voicepool.dev/pool": POOL, "voicepool.dev/state": "bound", "voicepool.dev/session": f"s-{name}"}
        annotations = {"voicepool.dev/bound-at": self.server.now.isoformat()}
        statuses = [{"name": "agent", "ready": True}]
        status = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": statuses}
        self.server.put(
            PODS, {"metadata": {"name": name, "labels": labels, "annotations": annotations}, "status": status}
        )

    @property
    def pods(self) -> list[str]:
        return [name for name in self.server.names(PODS) if not self._pod(name)["metadata"].get("deletionTimestamp")]

    def ended(self, reason: str) -> float:
        labels = {"namespace": "calls", "pool": POOL, "reason": reason}
        return self.metrics.registry.get_sample_value("voicepool_sessions_ended_total", labels) or 0.0

    def notes(self) -> list[str]:
        return [obj["reason"] for (plural, _, _), obj in self.server.objects.items() if plural == EVENTS.plural]

    def _pod(self, name: str) -> Json:
        return self.server.objects[("pods", "calls", name)]


@asynccontextmanager
async def operator(here: Here, may_write: Callable[[], bool] = lambda: True) -> AsyncIterator[None]:
    template = {"spec": {"containers": [{"name": "agent", "image": "example.org/agent:1"}]}}
    stored = here.server.put(
        POOLS, {"metadata": {"name": POOL, "generation": 1}, "spec": {"template": template, "replicas": 0}}
    )
    pods = pod_informer(here.server, None)
    pools = PoolStore()
    pool = pool_from_json(stored)
    assert pool is not None
    pools.apply(pool)
    controller = Controller(
        here.server,
        pods,
        pools,
        PodSettings("key"),
        here.metrics,
        lambda: here.server.now,
        ControllerSettings(),
        recorder=EventRecorder(here.server, "one", lambda: here.server.now, on_written=lambda outcome: None),
        may_write=may_write,
        ask_agent=here.ask,
    )
    tasks = [asyncio.create_task(pods.run()), asyncio.create_task(controller.run())]
    try:
        await asyncio.sleep(1)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_it_asks_only_when_no_gateway_can_deliver_any_more() -> None:
    slowest_clock_seconds = 10.0
    assert GatewayOptions().assignment_seconds < DELIVERY_DEADLINE_SECONDS
    assert DELIVERY_DEADLINE_SECONDS + slowest_clock_seconds < ASK_AFTER_SECONDS


@virtual
async def test_a_bind_that_was_never_delivered_is_reaped_and_told() -> None:
    here = Here()
    async with operator(here):
        here.bind("a")
        here.says["a"] = "parked"
        await asyncio.sleep(ASK_AFTER_SECONDS - 1)
        assert (here.asked, here.pods) == ([], ["a"])
        await asyncio.sleep(3)
        assert (here.asked, here.pods) == (["a"], [])
        await asyncio.sleep(10)
        assert "SessionUndelivered" in here.notes()
        assert here.ended("undelivered") == 1


@pytest.mark.parametrize("state", ["accepted", "joined", "ending"])
def test_a_call_is_asked_once_and_left_alone(state: str) -> None:
    @virtual
    async def story() -> None:
        here = Here()
        here.bind("a")
        here.says["a"] = state
        async with operator(here):
            await asyncio.sleep(10 * ASK_AFTER_SECONDS)
            here.server.change(PODS, "a", metadata={"annotations": {"other": "thing"}})
            await asyncio.sleep(10 * ASK_AFTER_SECONDS)
            assert (here.asked, here.pods) == (["a"], ["a"])

    story()


@pytest.mark.parametrize("state", [None, "starting"])
def test_an_agent_that_does_not_say_is_asked_again_and_never_reaped_for_that(state: str | None) -> None:
    @virtual
    async def story() -> None:
        here = Here()
        here.bind("a")
        here.says["a"] = state
        async with operator(here):
            await asyncio.sleep(3.5 * ASK_AFTER_SECONDS)
            assert (here.asked, here.pods) == (["a"] * 3, ["a"])
            here.says["a"] = "parked"
            await asyncio.sleep(ASK_AFTER_SECONDS)
            assert here.pods == []

    story()


@virtual
async def test_a_pod_that_changed_while_its_agent_was_asked_is_looked_at_anew() -> None:
    here = Here()
    here.bind("a")
    here.says["a"] = "parked"

    def change(name: str) -> None:
        here.server.change(PODS, name, metadata={"annotations": {"seen": str(len(here.asked))}})

    here.before_answer = change
    async with operator(here):
        await asyncio.sleep(1.5 * ASK_AFTER_SECONDS)
        assert (here.asked, here.pods) == (["a"], ["a"])
        here.before_answer = lambda name: None
        await asyncio.sleep(ASK_AFTER_SECONDS)
        assert (here.asked, here.pods) == (["a", "a"], [])


@virtual
async def test_a_delete_that_failed_is_tried_again() -> None:
    here = Here()
    here.bind("a")
    here.says["a"] = "parked"
    here.server.failures["delete"] = [ServerFault("no", status=500)]
    async with operator(here):
        await asyncio.sleep(1.5 * ASK_AFTER_SECONDS)
        assert here.pods == ["a"]
        await asyncio.sleep(ASK_AFTER_SECONDS)
        assert here.pods == []


@virtual
async def test_whoever_does_not_hold_the_lease_reaps_nothing() -> None:
    here = Here()
    here.bind("a")
    here.says["a"] = "parked"
    async with operator(here, may_write=lambda: False):
        await asyncio.sleep(3 * ASK_AFTER_SECONDS)
        assert here.pods == ["a"]


@virtual
async def test_calls_that_end_before_they_are_asked_are_forgotten() -> None:
    here = Here()
    async with operator(here):
        for name in "abc":
            here.bind(name)
        await asyncio.sleep(5)
        here.server.vanish(PODS, "a")
        terminated: Any = {"terminated": {"exitCode": 0}}
        ended = {"phase": "Succeeded", "containerStatuses": [{"name": "agent", "ready": False, "state": terminated}]}
        here.server.change(PODS, "b", status=ended)
        await asyncio.sleep(2 * ASK_AFTER_SECONDS)
        assert set(here.asked) == {"c"}
