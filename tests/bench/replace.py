"""From a bind to the create request of the replacement, by a real operator's process; beside it, a bare watch that is told of the same bind.

All times are the API server's own (its audit log), but for the bare watch, which is ours on the same machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from datetime import UTC, datetime

from tests.bench.audit import AuditLog
from tests.bench.figures import Figure, delays, of_quantile, quantile
from tests.bench.kubelet import Kubelet
from tests.bench.report import Row, number
from tests.bench.world import World, load_average
from voicepool.binding import active_deadline_seconds, bind_patch
from voicepool.kube.api import PODS
from voicepool.model import PodFact

NAME = "replace"
WARM = 30
ONE_AT_A_TIME = 150
STREAM = 200
STREAM_PER_SECOND = 20
GOAL_MILLISECONDS = 50.0


async def measure(world: World) -> list[Row]:
    """Run it; takes about half a minute."""
    load = load_average()
    namespace = await world.namespace("replace")
    await world.pool(namespace, "demo", replicas=WARM, maxPods=1000)
    kubelet = Kubelet(world, namespace)
    rows = []
    async with world.operator(namespace) as operator, kubelet.running():
        await operator.answers("/readyz", 200)
        await kubelet.wait_for_warm(WARM)
        with (
            world.progress.step("binding one after the other is replaced", 15),
            contextlib.closing(AuditLog(world.cluster.audit_log)) as log,
        ):
            for _ in range(ONE_AT_A_TIME):
                pod = kubelet.warm()[0]
                await _bind(world, pod)
                await kubelet.wait_for_bound(pod.name)
                await kubelet.wait_for_warm(WARM)
            rows += _rows("one at a time", log, namespace, kubelet, load)
        with (
            world.progress.step(f"binding {STREAM_PER_SECOND} a second", STREAM / STREAM_PER_SECOND),
            contextlib.closing(AuditLog(world.cluster.audit_log)) as log,
        ):
            await _stream(world, kubelet)
            # The watch may be behind.
            for name in {write.name for write in log.writes(namespace) if write.verb == "patch"}:
                await kubelet.wait_for_bound(name)
            await kubelet.wait_for_warm(WARM)
            rows += _rows(f"{STREAM_PER_SECOND} binds a second", log, namespace, kubelet, load)
    return rows


async def _stream(world: World, kubelet: Kubelet) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    taken: set[str] = set()
    async with asyncio.TaskGroup() as group:
        for turn in range(STREAM):
            await asyncio.sleep(began + turn / STREAM_PER_SECOND - loop.time())
            pod = await kubelet.take(taken)
            taken.add(pod.uid)
            group.create_task(_bind(world, pod))


async def _bind(world: World, pod: PodFact) -> None:
    now = datetime.now(UTC)
    session_id = str(uuid.uuid4())
    operations = bind_patch(
        pod,
        session_id=session_id,
        room=session_id,
        bound_at=now,
        bound_by="bench",
        active_deadline_seconds=active_deadline_seconds(pod, 7200, now),
    )
    await world.api.json_patch(PODS, pod.namespace, pod.name, operations)


def _rows(how: str, log: AuditLog, namespace: str, kubelet: Kubelet, load: float) -> list[Row]:
    found = log.writes(namespace)
    binds = [write for write in found if write.verb == "patch"]
    creates = [write.asked_at for write in found if write.verb == "create"]
    from_answer = delays([bind.answered_at for bind in binds], creates)
    from_request = delays([bind.asked_at for bind in binds], creates)
    told = [kubelet.bound_seen_at[bind.name] - bind.asked_at for bind in binds]
    rows = []
    for share in (0.5, 0.99):
        beside = f"a bare watch is told of it {number(quantile(told, share) * 1000)} ms after the bind's request"
        for since, values in (("bind's request", from_request), ("bind's answer", from_answer)):
            goal = GOAL_MILLISECONDS if share > 0.5 else None
            words = f"{how}, {since} to create request: p{share * 100:.0f}"
            rows.append(Row(NAME, words, _milliseconds(of_quantile(values, share)), "ms", goal, beside, load))
    return rows


def _milliseconds(figure: Figure) -> Figure:
    return Figure(figure.value * 1000, figure.low * 1000, figure.high * 1000, figure.samples)
