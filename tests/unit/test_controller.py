"""The controller does what the plan says, and survives what the API server answers."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.api_server import ApiServer, until

from voicepool import controller as controller_module
from voicepool import queue as queue_module
from voicepool import status_keeper as status_keeper_module
from voicepool import template_check
from voicepool.controller import WRITES_IN_A_TURN, Controller, ControllerSettings
from voicepool.copies import PoolStore, budget_informer, pod_informer
from voicepool.disruption import budget
from voicepool.events import Happening
from voicepool.kube.api import (
    BUDGETS,
    EVENTS,
    PODS,
    POOLS,
    Forbidden,
    Json,
    Resource,
    TooManyRequests,
    Unprocessable,
    Unreachable,
)
from voicepool.kube.convert import pool_from_json
from voicepool.metrics import OperatorMetrics
from voicepool.podspec import PodSettings
from voicepool.recorder import EventRecorder
from voicepool.webhooks import Webhooks

KEY = ("calls", "demo")
DEMO = {"namespace": "calls", "pool": "demo"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_keeper_module, "STATUS_INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr(queue_module, "RETRY_FIRST_SECONDS", 0.001)


@pytest.fixture
def server() -> ApiServer:
    return ApiServer()


def put_pool(server: ApiServer, name: str = "demo", **spec: Any) -> Json:
    template = {"spec": {"containers": [{"name": "agent", "image": "example.org/agent:1"}]}}
    return server.put(
        POOLS, {"metadata": {"name": name, "generation": 1}, "spec": {"template": template, "replicas": 2, **spec}}
    )


class Running:
    """A controller at work."""

    def __init__(self, server: ApiServer, controller: Controller, metrics: OperatorMetrics, task: Any) -> None:
        self.server = server
        self.controller = controller
        self.metrics = metrics
        self.task = task

    def show(self, name: str = "demo") -> None:
        """What a watch does when a pool changes."""
        pool = pool_from_json(self.server.objects[("voiceagentpools", "calls", name)])
        assert pool is not None
        self.controller.pool_changed(pool)

    def status(self) -> Json:
        return dict(self.server.objects[("voiceagentpools", "calls", "demo")].get("status", {}))

    def condition(self, kind: str) -> Json:
        found = [entry for entry in self.status().get("conditions", []) if entry["type"] == kind]
        return found[0] if found else {}

    def become_warm(self, name: str) -> None:
        statuses = [{"name": "agent", "ready": True}]
        status = {"phase": "Running", "podIP": "10.0.0.1", "startTime": self.server.now.isoformat()}
        self.server.change(PODS, name, status={**status, "containerStatuses": statuses})

    def failed(self, name: str) -> bool:
        return bool(self.server.objects[("pods", "calls", name)].get("status", {}).get("phase") == "Failed")

    def fail(self, name: str, words: str) -> None:
        if not self.failed(name):
            terminated = {"exitCode": 1, "message": words, "reason": "Error"}
            statuses = [{"name": "agent", "ready": False, "state": {"terminated": terminated}}]
            self.server.change(PODS, name, status={"phase": "Failed", "containerStatuses": statuses})

    def value(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0


@asynccontextmanager
async def running(server: ApiServer, *, webhooks: Webhooks | None = None, **settings: Any) -> AsyncIterator[Running]:
    metrics = OperatorMetrics(CollectorRegistry())
    pods = pod_informer(server, None)
    budgets = budget_informer(server, None)
    controller = Controller(
        server,
        pods,
        PoolStore(),
        PodSettings("key"),
        metrics,
        lambda: server.now,
        ControllerSettings(**{"resync_seconds": 3600, **settings}),
        budgets=budgets,
        webhooks=webhooks,
    )
    informing = asyncio.create_task(pods.run())
    counting = asyncio.create_task(budgets.run())
    working = asyncio.create_task(controller.run())
    try:
        yield Running(server, controller, metrics, working)
    finally:
        tasks = (working, informing, counting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_it_fills_a_pool_and_tells_so(server: ApiServer) -> None:
    put_pool(server)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        for name in server.names(PODS):
            it.become_warm(name)
        await until(lambda: it.condition("Ready").get("status") == "True")
        assert it.status()["readyReplicas"] == 2
        assert it.value("voicepool_pod_creates_total", namespace="calls", pool="demo") == 2
        assert it.value("voicepool_pods", namespace="calls", pool="demo", state="warm") == 2


async def test_a_list_of_pools_that_failed_is_soon_tried_again(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "LIST_AGAIN_SECONDS", 0.001)
    put_pool(server, replicas=1)
    list_page = server.list_page
    answers = iter([Unreachable("reset")])

    async def once_away(resource: Resource, *arguments: Any, **options: Any) -> Json:
        if resource == POOLS and (error := next(answers, None)) is not None:
            raise error
        return await list_page(resource, *arguments, **options)

    monkeypatch.setattr(server, "list_page", once_away)
    async with running(server) as it:
        await until(it.controller.pools_listed.is_set)


async def test_a_converged_pool_makes_no_write(server: ApiServer) -> None:
    put_pool(server)
    async with running(server, resync_seconds=0.005) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        for name in server.names(PODS):
            it.become_warm(name)
        await until(lambda: it.condition("Ready").get("status") == "True")
        done = it.value("voicepool_reconcile_seconds_count", outcome="ok")
        before = list(server.calls)
        await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > done + 10)
        assert server.calls == before


async def test_a_pool_that_needs_many_pods_does_not_keep_a_small_one_waiting(server: ApiServer) -> None:
    put_pool(server, "big", replicas=1000, maxPods=1000)
    put_pool(server, "small", replicas=1)
    async with running(server, workers=1):
        await until(lambda: any(name.startswith("small-") for name in server.names(PODS)))
        assert len(server.names(PODS)) <= 2 * WRITES_IN_A_TURN + 1
        await until(lambda: len(server.names(PODS)) == 1001)


async def test_before_it_takes_pods_away_it_reads_the_pool_again(server: ApiServer) -> None:
    put_pool(server, replicas=2)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        # What another one sees that has missed the last change: the same pool, with fewer replicas.
        stale = copy.deepcopy(server.objects[("voiceagentpools", "calls", "demo")])
        stale["spec"]["replicas"] = 0
        stale["metadata"]["generation"] = 0
        pool = pool_from_json(stale)
        assert pool is not None
        it.controller._pools._pools[KEY] = dataclasses.replace(pool, resource_version="0")
        it.controller.queue.add(KEY)
        await until(lambda: it.controller._pools.get(KEY).spec.replicas == 2)  # type: ignore[union-attr]
        assert len(server.names(PODS)) == 2
        assert not [call for call in server.calls if call[0] == "delete"]


async def test_where_somebody_else_deletes_its_pods_it_reads_the_pool_again(server: ApiServer) -> None:
    put_pool(server, replicas=2)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        # The end of the pool was not seen; the pods go with it.
        del server.objects[("voiceagentpools", "calls", "demo")]
        for name in server.names(PODS):
            server.vanish(PODS, name)
        await until(lambda: it.controller._pools.get(KEY) is None)
        assert server.names(PODS) == []


async def test_a_bound_pod_is_replaced(server: ApiServer) -> None:
    put_pool(server)
    async with running(server):
        await until(lambda: len(server.names(PODS)) == 2)
        name = server.names(PODS)[0]
        server.change(PODS, name, metadata={"labels": {"voicepool.dev/state": "bound"}})
        await until(lambda: len(server.names(PODS)) == 3)
        assert name in server.names(PODS)


async def test_a_storm_of_changes_that_ask_for_no_pod_is_not_looked_at_one_by_one(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_pool(server)
    async with running(server) as it:
        await until(lambda: it.status().get("startingReplicas") == 2)
        monkeypatch.setattr(controller_module, "LOOK_AGAIN_SECONDS", 3600)
        names = server.names(PODS)
        before = it.value("voicepool_reconcile_seconds_count", outcome="ok")
        for turn in range(50):
            server.change(PODS, names[turn % 2], metadata={"annotations": {"turn": str(turn)}})
            await asyncio.sleep(0.001)
        server.change(PODS, names[0], metadata={"labels": {"voicepool.dev/state": "bound"}})
        await until(lambda: len(server.names(PODS)) == 3)
        assert it.value("voicepool_reconcile_seconds_count", outcome="ok") <= before + 5


async def test_a_pod_that_has_become_warm_shows_in_the_status_a_little_later(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "LOOK_AGAIN_SECONDS", 0.01)
    put_pool(server)
    async with running(server) as it:
        await until(lambda: it.status().get("startingReplicas") == 2)
        it.become_warm(server.names(PODS)[0])
        await until(lambda: it.status().get("readyReplicas") == 1)


async def scaled_to_zero_after_an_unseen_change(it: Running, **change: Any) -> str:
    """Change the only pod without the watch telling of it, then ask for none; returns its name."""
    await until(lambda: len(it.server.names(PODS)) == 1)
    (name,) = it.server.names(PODS)
    it.server.muted = True
    await asyncio.sleep(0)
    it.server.change(PODS, name, **change)
    it.server.change(POOLS, "demo", spec={"replicas": 0}, metadata={"generation": 2})
    it.show()
    return name


async def test_a_bind_that_comes_before_the_delete_wins(server: ApiServer) -> None:
    put_pool(server, replicas=1)
    async with running(server) as it:
        name = await scaled_to_zero_after_an_unseen_change(it, metadata={"labels": {"voicepool.dev/state": "bound"}})
        await until(lambda: ("delete", name) in server.calls)
        assert server.names(PODS) == [name]
        assert it.value("voicepool_write_conflicts_total", operation="delete") >= 1


async def test_a_pod_that_changed_in_nothing_that_matters_is_read_again_and_deleted(server: ApiServer) -> None:
    put_pool(server, replicas=1)
    async with running(server) as it:
        name = await scaled_to_zero_after_an_unseen_change(it, metadata={"annotations": {"example.org/note": "x"}})
        await until(lambda: not server.names(PODS))
        assert server.calls.count(("delete", name)) == 2


async def test_scaled_down_it_deletes(server: ApiServer) -> None:
    put_pool(server)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        server.change(POOLS, "demo", spec={"replicas": 0}, metadata={"generation": 2})
        it.show()
        await until(lambda: not server.names(PODS))
        assert it.value("voicepool_pod_deletes_total", namespace="calls", pool="demo", reason="scale_down") == 2


async def test_a_pod_that_is_not_there_any_more_is_not_waited_for(server: ApiServer) -> None:
    put_pool(server, replicas=1)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 1)
        server.muted = True
        await asyncio.sleep(0)
        server.vanish(PODS, server.names(PODS)[0])
        server.change(POOLS, "demo", spec={"replicas": 0}, metadata={"generation": 2})
        it.show()
        await until(lambda: any(operation == "delete" for operation, _ in server.calls))
        await until(lambda: it.status().get("replicas") == 0)


async def test_a_pod_whose_end_is_seen_before_its_delete_is_answered_is_not_remembered(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_pool(server, replicas=1)
    delete = server.delete

    async def answered_late(*arguments: Any, **options: Any) -> None:
        await delete(*arguments, **options)
        await asyncio.sleep(0.01)

    monkeypatch.setattr(server, "delete", answered_late)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 1)
        server.change(POOLS, "demo", spec={"replicas": 0}, metadata={"generation": 2})
        it.show()
        labels = {"namespace": "calls", "pool": "demo", "reason": "scale_down"}
        await until(lambda: it.value("voicepool_pod_deletes_total", **labels) == 1)
        assert not it.controller._deleted


async def test_a_name_that_is_taken_is_no_error(server: ApiServer) -> None:
    put_pool(server, replicas=1)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 1)
        # A second leader that has not seen the first one's pod.
        pods = pod_informer(server, None)
        pods.synced.set()
        second = Controller(
            server, pods, PoolStore(), PodSettings("key"), it.metrics, lambda: server.now, ControllerSettings()
        )
        pool = pool_from_json(server.objects[("voiceagentpools", "calls", "demo")])
        assert pool is not None
        second.pool_changed(pool)
        await second.reconcile(KEY)
        second.queue.clear()
        assert len(server.names(PODS)) == 1
        assert it.value("voicepool_write_conflicts_total", operation="create") == 1


async def test_failed_creates_are_tried_again_few_at_a_time(server: ApiServer) -> None:
    put_pool(server, replicas=20)
    server.failures["create"] = [Unreachable("reset"), TooManyRequests("slow", retry_after_seconds=0.001)]
    async with running(server) as it:
        await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="error") >= 1)
        await until(lambda: len(server.names(PODS)) == 20)


async def test_a_refused_template_is_told_and_checked_again_later(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_pool(server)
    server.failures["dry_run"] = [Unprocessable('unknown field "imagee"', status=400)]
    async with running(server) as it:
        await until(lambda: it.condition("TemplateValid").get("status") == "False")
        assert "imagee" in it.condition("Ready")["message"]
        assert not server.names(PODS)
        monkeypatch.setattr(template_check, "RECHECK_SECONDS", 0.0)
        it.controller.queue.add(KEY)
        await until(lambda: len(server.names(PODS)) == 2)
        await until(lambda: it.condition("TemplateValid").get("status") == "True")


async def test_a_create_that_a_quota_forbids_is_told(server: ApiServer) -> None:
    put_pool(server, replicas=1)
    server.failures["create"] = [Forbidden("exceeded quota: pods", status=403)]
    async with running(server) as it:
        await until(lambda: "exceeded quota" in it.condition("TemplateValid").get("message", ""))


async def test_rights_that_an_api_server_does_not_know_yet_hold_a_pool_up_for_a_moment_only(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_check, "RECHECK_SECONDS", 0.0)
    put_pool(server)
    words = 'pods is forbidden: User "operator" cannot create resource "pods" in API group "" in the namespace "calls"'
    server.failures["create"] = [Forbidden(words, status=403)]
    server.failures["dry_run"] = [Forbidden(words, status=403)]
    async with running(server):
        await until(lambda: len(server.names(PODS)) == 2)


async def test_ended_pods_of_a_pool_that_is_gone_are_cleaned_up_and_bound_ones_left(server: ApiServer) -> None:
    put_pool(server)
    async with running(server, orphan_retention_seconds=60) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        first, second = server.names(PODS)
        for name in (first, second):
            server.change(PODS, name, metadata={"labels": {"voicepool.dev/state": "bound"}})
        finished = (server.now + timedelta(seconds=1)).isoformat()
        state = {"terminated": {"exitCode": 0, "finishedAt": finished}}
        uid = server.objects[("voiceagentpools", "calls", "demo")]["metadata"]["uid"]
        server.vanish(POOLS, "demo")
        it.controller.pool_deleted(KEY, uid)
        ended = {"phase": "Succeeded", "containerStatuses": [{"name": "agent", "state": state}]}
        server.change(PODS, first, status=ended)
        done = it.value("voicepool_reconcile_seconds_count", outcome="ok")
        await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > done)
        assert first in server.names(PODS)
        server.now += timedelta(seconds=61)
        it.controller.queue.add(KEY)
        await until(lambda: first not in server.names(PODS))
        assert second in server.names(PODS)
        assert (
            it.metrics.registry.get_sample_value("voicepool_warm_target_pods", {"namespace": "calls", "pool": "demo"})
            is None
        )


async def test_a_pool_whose_deletion_nobody_saw_is_dropped_by_the_next_list(server: ApiServer) -> None:
    put_pool(server)
    async with running(server, resync_seconds=0.005) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        server.vanish(POOLS, "demo")
        labels = {"namespace": "calls", "pool": "demo"}
        await until(lambda: it.metrics.registry.get_sample_value("voicepool_warm_target_pods", labels) is None)
        for name in server.names(PODS):
            server.vanish(PODS, name)
        done = it.value("voicepool_reconcile_seconds_count", outcome="ok")
        await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > done)
        assert not server.names(PODS)


async def test_of_a_pool_that_is_gone_nothing_is_measured_any_more_when_its_last_pod_is_gone(server: ApiServer) -> None:
    put_pool(server)
    put_pool(server, "other", replicas=1)

    def measured() -> set[str]:
        samples = [sample for metric in it.metrics.registry.collect() for sample in metric.samples]
        return {sample.labels["pool"] for sample in samples if "pool" in sample.labels}

    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 3)
        call = server.names(PODS)[0]
        it.become_warm(call)
        server.change(PODS, call, metadata={"labels": {"voicepool.dev/state": "bound"}})
        await until(lambda: len(server.names(PODS)) == 4)
        uid = server.objects[("voiceagentpools", "calls", "demo")]["metadata"]["uid"]
        server.vanish(POOLS, "demo")
        it.controller.pool_deleted(KEY, uid)
        for name in server.names(PODS):
            if name.startswith("demo-") and name != call:
                server.vanish(PODS, name)
        await until(lambda: it.metrics.registry.get_sample_value("voicepool_warm_target_pods", DEMO) is None)
        assert it.value("voicepool_sessions_started_total", **DEMO) == 1
        server.vanish(PODS, call)
        await until(lambda: measured() == {"other"})


async def test_an_error_that_nobody_expected_ends_it(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    put_pool(server)

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(controller_module, "plan", broken)
    async with running(server) as it:
        with pytest.raises(ExceptionGroup):
            await it.task


def test_the_store_keeps_the_newest_and_knows_its_own() -> None:
    store = PoolStore()
    server = ApiServer()
    older = pool_from_json(put_pool(server))
    newer = pool_from_json(put_pool(server, replicas=3))
    assert older is not None
    assert newer is not None
    assert store.apply(newer)
    assert not store.apply(older)
    assert store.get(KEY) is newer
    assert not store.remove(KEY, "another uid")
    assert store.replace([], position=int(older.resource_version)) == set()
    assert store.replace([], position=int(newer.resource_version)) == {KEY}
    assert list(store) == []


async def test_where_the_lease_is_not_pools_are_followed_and_nothing_is_written(server: ApiServer) -> None:
    put_pool(server)
    metrics = OperatorMetrics(CollectorRegistry())
    pods = pod_informer(server, None)
    controller = Controller(server, pods, PoolStore(), PodSettings("key"), metrics, lambda: server.now)
    tasks = [asyncio.create_task(pods.run()), asyncio.create_task(controller.watch())]
    try:
        await until(controller.pools_listed.is_set)
        await asyncio.sleep(0.01)
        assert server.calls == []
        assert controller.pools_age_seconds() < 60
        assert controller.pools_owed_seconds() > 0, "no watch has told of the pool yet"
        assert len(controller.queue) == 0

        # It wins, loses, and wins again.
        for count in (2, 3):
            server.change(POOLS, "demo", spec={"replicas": count}, metadata={"generation": count})
            pool = pool_from_json(server.objects[("voiceagentpools", "calls", "demo")])
            assert pool is not None
            controller.pool_changed(pool)
            assert controller.pools_owed_seconds() == 0
            working = asyncio.create_task(controller.work())
            await until(lambda count=count: len(server.names(PODS)) == count)
            labels = {"namespace": "calls", "pool": "demo"}
            assert metrics.registry.get_sample_value("voicepool_warm_target_pods", labels) == count
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            assert metrics.registry.get_sample_value("voicepool_warm_target_pods", labels) is None
            before = list(server.calls)
            server.vanish(PODS, server.names(PODS)[0])
            await until(lambda count=count: len(pods) == count - 1)
            await asyncio.sleep(0.01)
            assert server.calls == before
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_does_not_hold_the_lease_any_more_takes_no_pool_up(server: ApiServer) -> None:
    put_pool(server)
    pods = pod_informer(server, None)
    metrics = OperatorMetrics(CollectorRegistry())
    asked: list[bool] = []

    def may_write() -> bool:
        asked.append(True)
        return False

    controller = Controller(
        server, pods, PoolStore(), PodSettings("key"), metrics, lambda: server.now, may_write=may_write
    )
    tasks = [asyncio.create_task(pods.run()), asyncio.create_task(controller.run())]
    try:
        await until(lambda: asked)
        await asyncio.sleep(0.01)
        assert server.calls == []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def recording(server: ApiServer) -> AsyncIterator[Running]:
    metrics = OperatorMetrics(CollectorRegistry())
    pods = pod_informer(server, None)
    recorder = EventRecorder(
        server,
        "operator-a",
        lambda: server.now,
        on_written=lambda outcome: metrics.events.labels(outcome).inc(),
    )
    controller = Controller(
        server, pods, PoolStore(), PodSettings("key"), metrics, lambda: server.now, recorder=recorder
    )
    tasks = [asyncio.create_task(pods.run()), asyncio.create_task(controller.run())]
    try:
        yield Running(server, controller, metrics, tasks[1])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def told(server: ApiServer) -> list[str]:
    return [obj["reason"] for (plural, *_), obj in server.objects.items() if plural == EVENTS.plural]


async def test_the_life_of_a_session_is_counted_and_its_loss_is_told(server: ApiServer) -> None:
    put_pool(server)
    async with recording(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        names = server.names(PODS)
        for name in names:
            it.become_warm(name)
        await until(lambda: told(server) == ["Ready"])
        for name in names:
            bound_at = {"voicepool.dev/bound-at": server.now.isoformat()}
            waited = {"voicepool.dev/waited-seconds": "0.012" if name == names[0] else "1.500"}
            server.change(
                PODS,
                name,
                metadata={"labels": {"voicepool.dev/state": "bound"}, "annotations": {**bound_at, **waited}},
            )
        await until(lambda: len(server.names(PODS)) == 4)
        summary = '{"session":"s","reason":"idle"}'
        for name, code, message in ((names[0], 0, summary), (names[1], 137, None)):
            terminated = {"exitCode": code, "message": message, "reason": "OOMKilled" if code else "Completed"}
            statuses = [{"name": "agent", "ready": False, "state": {"terminated": terminated}}]
            phase = "Failed" if code else "Succeeded"
            server.change(PODS, name, status={"phase": phase, "containerStatuses": statuses})
        await until(lambda: "SessionDropped" in told(server))
        pool = {"namespace": "calls", "pool": "demo"}
        assert it.value("voicepool_sessions_started_total", **pool) == 2
        assert it.value("voicepool_sessions_ended_total", **pool, reason="idle") == 1
        assert it.value("voicepool_sessions_dropped_total", **pool, reason="out-of-memory") == 1
        assert it.value("voicepool_startup_seconds_count", **pool) == 2
        assert it.value("voicepool_startup_phase_seconds_count", **pool, phase="scheduling") == 2
        assert it.value("voicepool_event_lag_seconds_count") == 2
        assert it.value("voicepool_queue_age_seconds_count") > 0
        assert told(server) == ["Ready", "SessionDropped"]
        assert it.value("voicepool_session_waited_seconds_sum", **pool) == 1.512
        counts = {"started": 2, "hits": 1, "hitPercent": 50, "ended": 1, "dropped": 1, "undelivered": 0}
        times = {"waitedMillisecondsP50": 12, "waitedMillisecondsP99": 1500}
        await until(lambda: it.status().get("sessions") == counts | times)


class Told(Webhooks):
    """Keeps what is told, and sends it nowhere."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def tell(self, happening: Happening) -> None:
        self.told.append((happening.kind, happening.reason))

    async def run(self) -> None:
        await asyncio.Event().wait()


async def test_a_session_is_told_when_it_begins_and_ends_and_again_by_an_operator_that_begins(
    server: ApiServer,
) -> None:
    put_pool(server, replicas=1)
    told = Told()
    async with running(server, webhooks=told) as it:
        await until(lambda: server.names(PODS))
        (name,) = server.names(PODS)
        it.become_warm(name)
        annotations = {"voicepool.dev/bound-at": server.now.isoformat()}
        server.change(PODS, name, metadata={"labels": {"voicepool.dev/state": "bound"}, "annotations": annotations})
        await until(lambda: ("session_started", "") in told.told)
        terminated = {"exitCode": 0, "message": '{"session":"s","reason":"idle"}', "finishedAt": server.now.isoformat()}
        statuses = [{"name": "agent", "ready": False, "state": {"terminated": terminated}}]
        server.change(PODS, name, status={"phase": "Succeeded", "containerStatuses": statuses})
        await until(lambda: ("session_ended", "idle") in told.told)
    another = Told()
    async with running(server, webhooks=another):
        await until(lambda: another.told == [("session_started", ""), ("session_ended", "idle")])


async def test_sessions_are_counted_on_from_what_another_operator_wrote(server: ApiServer) -> None:
    put_pool(server)
    server.change(POOLS, "demo", status={"sessions": {"started": 40, "ended": 39, "dropped": 1}})
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        server.change(PODS, server.names(PODS)[0], metadata={"labels": {"voicepool.dev/state": "bound"}})
        counts = {"started": 41, "hits": 0, "hitPercent": 0, "ended": 39, "dropped": 1, "undelivered": 0}
        await until(lambda: it.status().get("sessions") == counts)


@pytest.mark.parametrize("stored", [True, False])
async def test_a_session_is_counted_once_when_the_answer_to_the_status_is_lost(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    put_pool(server)
    merge_patch = server.merge_patch
    losses = iter([Unreachable("reset"), Unreachable("reset")])

    async def unanswered(resource: Resource, namespace: str, name: str, body: Json, **options: Any) -> Json:
        lost = next(losses, None) if "sessions" in body["status"] else None
        answer: Json = {} if lost and not stored else await merge_patch(resource, namespace, name, body, **options)
        if lost:
            raise lost
        return answer

    monkeypatch.setattr(server, "merge_patch", unanswered)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        for count, name in enumerate(server.names(PODS), 1):
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            server.change(PODS, name, metadata={"labels": {"voicepool.dev/state": "bound"}})
            await until(lambda count=count: it.status().get("sessions", {}).get("started") == count)
            await until(lambda looked=looked: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked + 1)
            assert it.status()["sessions"]["started"] == count
        assert next(losses, None) is None, "no answer was lost"
        await until(lambda: not it.controller._statuses._counts.waits(KEY))


async def test_a_session_that_is_counted_while_the_status_is_in_doubt_is_not_forgotten(server: ApiServer) -> None:
    put_pool(server)
    async with running(server) as it:
        await until(lambda: it.status().get("startingReplicas") == 2)
        first, second = server.names(PODS)
        server.failures["status"] = [Unreachable("reset")] * 6
        server.change(PODS, first, metadata={"labels": {"voicepool.dev/state": "bound"}})
        await until(lambda: len(server.failures["status"]) < 6)
        server.change(PODS, second, metadata={"labels": {"voicepool.dev/state": "bound"}})
        await until(lambda: not server.failures["status"])
        await until(lambda: it.status().get("sessions", {}).get("started") == 2)
        assert it.value("voicepool_status_writes_total", **DEMO, outcome="failed") == 6


async def test_an_event_that_cannot_be_written_stops_nothing(server: ApiServer) -> None:
    put_pool(server)
    async with recording(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        server.failures["create"] = [Forbidden("events is forbidden", status=403)]
        for name in server.names(PODS):
            it.become_warm(name)
        await until(lambda: it.value("voicepool_events_total", outcome="failed") == 1)
        assert it.condition("Ready")["status"] == "True"
        server.vanish(PODS, server.names(PODS)[0])
        await until(lambda: len(server.names(PODS)) == 2)
        assert told(server) == []


async def test_starts_that_fail_are_told_with_the_agents_words(server: ApiServer) -> None:
    put_pool(server, replicas=1)
    async with recording(server) as it:
        for _ in range(2):
            await until(lambda: [n for n in server.names(PODS) if not it.failed(n)] != [])
            for name in server.names(PODS):
                it.fail(name, "GROQ_API_KEY is not set")
        await until(lambda: it.condition("Stalled").get("status") == "True")
        await until(lambda: {"StartFailed", "Stalled"} <= set(told(server)))
        labels = {"namespace": "calls", "pool": "demo", "reason": "crashed"}
        assert it.value("voicepool_start_failures_total", **labels) == 2


@pytest.mark.parametrize(
    ("was_warm", "reason", "metric"),
    [
        (True, "WarmPodDied", "voicepool_warm_pod_deaths_total"),
        (False, "StartupDeadlineExceeded", "voicepool_start_failures_total"),
    ],
)
async def test_a_pod_that_is_not_ready_in_time_is_told_as_what_it_was(
    server: ApiServer, *, was_warm: bool, reason: str, metric: str
) -> None:
    put_pool(server, replicas=1)
    async with recording(server) as it:
        await until(lambda: len(server.names(PODS)) == 1)
        [name] = server.names(PODS)
        if was_warm:
            it.become_warm(name)
        since = server.now - timedelta(hours=1)
        started = since - timedelta(hours=was_warm)
        agent = {"name": "agent", "ready": False, "state": {"running": {"startedAt": started.isoformat()}}}
        server.objects[("pods", "calls", name)]["metadata"]["creationTimestamp"] = since.isoformat()
        ready = {"type": "Ready", "status": "False", "lastTransitionTime": since.isoformat()}
        server.change(PODS, name, status={"phase": "Running", "containerStatuses": [agent], "conditions": [ready]})
        await until(lambda: reason in told(server))
        assert it.value(metric, namespace="calls", pool="demo", reason="deadline") == 1


async def test_a_recommendation_is_a_metric_too(server: ApiServer) -> None:
    put_pool(server, headroom={"schedules": [{"cron": "0 8 * * *", "warmPods": 7}]})
    async with running(server) as it:
        await until(lambda: it.value("voicepool_recommended_pods", namespace="calls", pool="demo") == 7)
        await until(lambda: it.status().get("recommendedReplicas") == 7)


class TestBudget:
    """The PodDisruptionBudget of a pool."""

    def budget(self, server: ApiServer) -> Json:
        return server.objects["poddisruptionbudgets", "calls", "demo-bound"]

    async def test_a_pool_has_one_that_is_made_once_and_kept_as_it_should_be(self, server: ApiServer) -> None:
        put_pool(server)
        async with running(server, resync_seconds=0.005) as it:
            await until(lambda: server.names(BUDGETS) == ["demo-bound"])
            await until(lambda: len(server.names(PODS)) == 2)
            server.change(BUDGETS, "demo-bound", status={"currentHealthy": 1})
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked + 5)
            server.change(BUDGETS, "demo-bound", spec={"minAvailable": 1})
            await until(lambda: self.budget(server)["spec"]["minAvailable"] == 2147483647)
            assert [call for call in server.calls if call[1] == "demo-bound"] == [
                ("create", "demo-bound"),
                ("json_patch", "demo-bound"),
            ]

    @pytest.mark.parametrize("policy", ["OnUpgrade", "Always"])
    async def test_it_goes_when_evictions_are_allowed(self, server: ApiServer, policy: str) -> None:
        put_pool(server)
        async with running(server) as it:
            await until(lambda: server.names(BUDGETS) == ["demo-bound"])
            server.change(POOLS, "demo", spec={"disruption": policy})
            it.show()
            await until(lambda: not server.names(BUDGETS))

    async def test_it_outlives_its_pool_until_the_last_call_has_ended(self, server: ApiServer) -> None:
        put_pool(server)
        async with running(server) as it:
            await until(lambda: len(server.names(PODS)) == 2 and server.names(BUDGETS) != [])
            bound, unbound = server.names(PODS)
            server.change(PODS, bound, metadata={"labels": {"voicepool.dev/state": "bound"}})
            await until(lambda: len(server.names(PODS)) == 3)
            uid = server.objects["voiceagentpools", "calls", "demo"]["metadata"]["uid"]
            server.vanish(POOLS, "demo")
            it.controller.pool_deleted(KEY, uid)
            for name in server.names(PODS):
                if name != bound:
                    server.vanish(PODS, name)
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            it.controller.queue.add(KEY)
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked)
            assert server.names(BUDGETS) == ["demo-bound"]
            server.vanish(PODS, bound)
            await until(lambda: not server.names(BUDGETS))
        assert unbound not in server.names(PODS)

    async def test_a_call_whose_bind_is_still_on_its_way_to_us_keeps_it(self, server: ApiServer) -> None:
        put_pool(server, replicas=1)
        async with running(server) as it:
            await until(lambda: len(server.names(PODS)) == 1 and server.names(BUDGETS) != [])
            (pod,) = server.names(PODS)
            server.muted = True
            await asyncio.sleep(0)
            server.change(PODS, pod, metadata={"labels": {"voicepool.dev/state": "bound"}})
            uid = server.objects["voiceagentpools", "calls", "demo"]["metadata"]["uid"]
            server.vanish(POOLS, "demo")
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            it.controller.pool_deleted(KEY, uid)
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked)
            assert server.names(BUDGETS) == ["demo-bound"]

    async def test_a_call_that_our_copy_does_not_show_at_all_keeps_it(
        self, server: ApiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(controller_module, "UNSEEN_CALLS_SECONDS", 0.01)
        put_pool(server, replicas=0)
        async with running(server) as it:
            await until(lambda: server.names(BUDGETS) != [])
            server.muted = True
            await asyncio.sleep(0)
            labels = {"voicepool.dev/pool": "demo", "voicepool.dev/state": "bound"}
            server.put(PODS, {"metadata": {"name": "call", "labels": labels}})
            uid = server.objects["voiceagentpools", "calls", "demo"]["metadata"]["uid"]
            server.vanish(POOLS, "demo")
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            it.controller.pool_deleted(KEY, uid)
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked + 3)
            assert server.names(BUDGETS) == ["demo-bound"]
            server.change(PODS, "call", status={"phase": "Succeeded"})
            await until(lambda: not server.names(BUDGETS))

    async def test_one_that_has_changed_unseen_is_read_anew_and_deleted(self, server: ApiServer) -> None:
        put_pool(server, replicas=0)
        async with running(server) as it:
            await until(lambda: server.names(BUDGETS) != [])
            server.muted = True
            await asyncio.sleep(0)
            server.change(BUDGETS, "demo-bound", status={"expectedPods": 1})
            uid = server.objects["voiceagentpools", "calls", "demo"]["metadata"]["uid"]
            server.vanish(POOLS, "demo")
            it.controller.pool_deleted(KEY, uid)
            await until(lambda: not server.names(BUDGETS))
            assert it.value("voicepool_write_conflicts_total", operation="budget") == 1

    async def test_one_that_was_left_behind_is_found(self, server: ApiServer) -> None:
        server.put(BUDGETS, budget("calls", "demo"))
        async with running(server):
            await until(lambda: not server.names(BUDGETS))

    async def test_that_of_a_pool_which_we_cannot_read_stays(self, server: ApiServer) -> None:
        put_pool(server, something_new=1)
        server.put(BUDGETS, budget("calls", "demo"))
        async with running(server) as it:
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > 0)
            assert server.names(BUDGETS) == ["demo-bound"]

    async def test_without_the_right_to_it_pools_are_filled_all_the_same(self, server: ApiServer) -> None:
        put_pool(server)
        server.failures["create budget"] = [Forbidden("poddisruptionbudgets is forbidden", status=403)]
        async with running(server):
            await until(lambda: len(server.names(PODS)) == 2)

    async def test_one_of_the_same_name_that_is_not_ours_is_left_alone_and_told(
        self, server: ApiServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        foreign = server.put(BUDGETS, {"metadata": {"name": "demo-bound"}, "spec": {"minAvailable": 1}})
        put_pool(server)
        async with running(server) as it:
            await until(lambda: it.value("voicepool_write_conflicts_total", operation="budget") > 0)
            assert self.budget(server) == foreign
        assert "not protected" in caplog.text


class TestDrain:
    """Calls whose pool is deleted."""

    async def deleted_with_a_call(self, server: ApiServer, it: Running, **annotations: str) -> str:
        await until(lambda: len(server.names(PODS)) == 2)
        call = server.names(PODS)[0]
        noted = {f"voicepool.dev/{name.replace('_', '-')}": value for name, value in annotations.items()}
        labels = {"voicepool.dev/state": "bound"}
        server.change(PODS, call, metadata={"labels": labels, "annotations": noted})
        await until(lambda: len(server.names(PODS)) == 3)
        uid = server.objects["voiceagentpools", "calls", "demo"]["metadata"]["uid"]
        server.vanish(POOLS, "demo")
        it.controller.pool_deleted(KEY, uid)
        return call

    def drain_until(self, server: ApiServer, name: str) -> str | None:
        annotations = server.objects["pods", "calls", name]["metadata"]["annotations"]
        found: str | None = annotations.get("voicepool.dev/drain-until")
        return found

    async def test_a_limit_is_written_down_once_and_ends_the_call(self, server: ApiServer) -> None:
        put_pool(server)
        async with running(server) as it:
            call = await self.deleted_with_a_call(server, it, drain_seconds="60")
            await until(lambda: self.drain_until(server, call) == "2026-03-01T12:01:00.000000Z")
            server.now += timedelta(seconds=59)
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            it.controller.queue.add(KEY)
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked)
            assert call in server.names(PODS)
            server.now += timedelta(seconds=1)
            it.controller.queue.add(KEY)
            await until(lambda: call not in server.names(PODS))
            assert [entry for entry in server.calls if entry[1] == call][1:] == [("json_patch", call), ("delete", call)]
            assert it.value("voicepool_pod_deletes_total", namespace="calls", pool="demo", reason="drained") == 1

    async def test_a_pool_of_the_same_name_takes_it_over_and_a_second_deletion_counts_anew(
        self, server: ApiServer
    ) -> None:
        put_pool(server)
        async with running(server) as it:
            call = await self.deleted_with_a_call(server, it, drain_seconds="60")
            await until(lambda: self.drain_until(server, call) is not None)
            again = pool_from_json(put_pool(server))
            assert again is not None
            it.controller.pool_changed(again)
            await until(lambda: self.drain_until(server, call) is None)
            server.now += timedelta(seconds=600)
            server.vanish(POOLS, "demo")
            it.controller.pool_deleted(KEY, again.uid)
            await until(lambda: self.drain_until(server, call) == "2026-03-01T12:11:00.000000Z")

    async def test_a_call_in_a_pod_that_somebody_else_has_deleted_is_ended_once(self, server: ApiServer) -> None:
        put_pool(server)
        async with running(server) as it:
            call = await self.deleted_with_a_call(server, it, drain_seconds="60")
            await until(lambda: self.drain_until(server, call) is not None)
            server.lingers = True
            server.change(PODS, call, metadata={"deletionTimestamp": "2026-03-01T14:00:00Z"})
            server.now += timedelta(seconds=60)
            it.controller.queue.add(KEY)
            deletes = {"namespace": "calls", "pool": "demo", "reason": "drained"}
            # One that names the version from before is refused, and does not count.
            await until(lambda: it.value("voicepool_pod_deletes_total", **deletes) == 1)
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            it.controller.queue.add(KEY)
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked)
            assert it.value("voicepool_pod_deletes_total", **deletes) == 1

    async def test_a_delete_that_failed_is_sent_again(self, server: ApiServer) -> None:
        put_pool(server)
        async with running(server) as it:
            call = await self.deleted_with_a_call(server, it, drain_seconds="60")
            await until(lambda: self.drain_until(server, call) is not None)
            server.failures["delete"] = [Unreachable("reset")]
            server.now += timedelta(seconds=60)
            it.controller.queue.add(KEY)
            await until(lambda: call not in server.names(PODS))

    async def test_without_a_limit_it_goes_on(self, server: ApiServer) -> None:
        put_pool(server)
        async with running(server) as it:
            call = await self.deleted_with_a_call(server, it)
            server.now += timedelta(days=1)
            looked = it.value("voicepool_reconcile_seconds_count", outcome="ok")
            it.controller.queue.add(KEY)
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > looked)
            assert call in server.names(PODS)

    async def test_a_pool_that_is_only_missing_from_our_copy_ends_no_call(self, server: ApiServer) -> None:
        put_pool(server, something_new=1)
        labels = {"voicepool.dev/pool": "demo", "voicepool.dev/state": "bound"}
        limits = {"voicepool.dev/drain-seconds": "60", "voicepool.dev/drain-until": server.now.isoformat()}
        server.put(PODS, {"metadata": {"name": "call", "labels": labels, "annotations": limits}})
        async with running(server) as it:
            await until(lambda: it.value("voicepool_reconcile_seconds_count", outcome="ok") > 0)
            assert server.names(PODS) == ["call"]

    async def test_another_writer_who_was_faster_stands(self, server: ApiServer) -> None:
        put_pool(server)
        server.failures["json_patch"] = [Unprocessable("test failed", status=422)]
        async with running(server) as it:
            await self.deleted_with_a_call(server, it, drain_seconds="60")
            await until(lambda: it.value("voicepool_write_conflicts_total", operation="drain") == 1)


async def test_a_status_is_made_anew_when_the_pool_has_changed_meanwhile(server: ApiServer) -> None:
    put_pool(server)
    async with running(server) as it:
        await until(lambda: len(server.names(PODS)) == 2)
        # No watch shows that: the next write of the status is refused, and then the pool is read.
        server.change(POOLS, "demo", metadata={"generation": 2}, spec={"replicas": 3})
        for name in server.names(PODS):
            it.become_warm(name)
        await until(lambda: it.status().get("observedGeneration") == 2)
        assert it.value("voicepool_write_conflicts_total", operation="status") >= 1
        await until(lambda: len(server.names(PODS)) == 3)


async def test_a_pool_of_the_same_name_is_not_given_the_status_of_the_one_before(server: ApiServer) -> None:
    put_pool(server)
    async with running(server) as it:
        await until(lambda: it.status().get("replicas") == 2)
        server.vanish(POOLS, "demo")
        put_pool(server, replicas=1)
        await it.controller.reconcile(KEY)
        it.become_warm(server.names(PODS)[0])
        await until(lambda: it.value("voicepool_write_conflicts_total", operation="status") >= 1)
        await until(lambda: it.status().get("replicas") == 1)


class _Unanswered:
    """Holds back the answers to writes of a status, which are stored at once."""

    def __init__(self, server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        self.answered = asyncio.Event()
        self._merge_patch = server.merge_patch
        monkeypatch.setattr(server, "merge_patch", self._patch)

    async def _patch(self, *about: Any, **options: Any) -> Json:
        stored = await self._merge_patch(*about, **options)
        self.asked.set()
        await self.answer.wait()
        self.answered.set()
        return stored


async def test_no_caller_waits_for_a_status(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    put_pool(server)
    status = _Unanswered(server, monkeypatch)
    async with running(server) as it:
        await status.asked.wait()
        first, second = server.names(PODS)
        it.become_warm(first)
        it.become_warm(second)
        server.change(PODS, first, metadata={"labels": {"voicepool.dev/state": "bound"}})
        await until(lambda: len(server.names(PODS)) == 3)
        assert not status.answered.is_set()
        status.answer.set()
        await until(lambda: it.status().get("sessions", {}).get("started") == 1)
        await until(lambda: it.status().get("boundReplicas") == 1)
        assert it.value("voicepool_write_conflicts_total", operation="status") == 0


async def test_what_was_counted_of_a_pool_that_is_gone_is_not_taken_from_its_successor(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_pool(server)
    async with running(server) as it:
        await until(lambda: it.status().get("replicas") == 2)
        status = _Unanswered(server, monkeypatch)
        server.change(PODS, server.names(PODS)[0], metadata={"labels": {"voicepool.dev/state": "bound"}})
        await status.asked.wait()
        gone = server.objects[("voiceagentpools", "calls", "demo")]["metadata"]["uid"]
        server.vanish(POOLS, "demo")
        it.controller.pool_deleted(KEY, gone)
        await until(lambda: it.value("voicepool_pods", **DEMO, state="bound") == 0)
        put_pool(server)
        it.show()
        await until(lambda: it.value("voicepool_pods", **DEMO, state="bound") == 1)
        it.controller._statuses.count(KEY, "started")
        status.answer.set()
        await until(lambda: it.status().get("sessions", {}).get("started") == 1)
