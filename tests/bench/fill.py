"""How fast the operator fills an empty pool, beside as many bare creates of the same pod by the same client. In turns."""

from __future__ import annotations

import contextlib
import time

from tests.bench.audit import AuditLog
from tests.bench.figures import over_rounds, quantile, ratio_over_rounds
from tests.bench.report import Row, number
from tests.bench.world import World, in_parallel, load_average, pool_object, until
from voicepool.kube.api import PODS, POOLS
from voicepool.kube.convert import pool_from_json
from voicepool.podspec import build_pod, template_hash

NAME = "fill"
PODS_IN_POOL = 300
ROUNDS = 5
PARALLEL_WRITES = 16
"""As many creates at once as the operator makes, and therefore as the floor's."""
SPEC = {"replicas": PODS_IN_POOL, "maxPods": PODS_IN_POOL, "startup": {"deadlineSeconds": 3600}}
"""Nobody makes these pods Ready; that must not count as a failure of theirs."""


async def measure(world: World) -> list[Row]:
    """Run it; takes about half a minute."""
    load = load_average()
    bare = await world.namespace("fill-floor")
    namespace = await world.namespace("fill")
    floor: list[float] = []
    filled: list[float] = []
    with world.progress.step(f"filling {ROUNDS} pools of {PODS_IN_POOL} pods", 20):
        async with world.operator(namespace) as operator:
            await operator.answers("/readyz", 200)
            for turn in range(ROUNDS):
                steps = [(_create_bare, bare, floor), (_fill, namespace, filled)]
                for do, where, seconds in steps if turn % 2 == 0 else reversed(steps):
                    seconds.append(await do(world, where, f"pool-{turn}"))
    beside = f"{number(quantile(filled, 0.5))} s, floor {number(quantile(floor, 0.5))} s"
    what = f"{PODS_IN_POOL} creates accepted"
    return [
        Row(NAME, f"{what}, bare, {PARALLEL_WRITES} at once", over_rounds(floor), "s", load=load),
        Row(NAME, f"{what}, from the pool's own create on", ratio_over_rounds(filled, floor), "x", None, beside, load),
    ]


async def _create_bare(world: World, namespace: str, name: str) -> float:
    pool = pool_from_json(await world.api.create(POOLS, namespace, pool_object(namespace, name, **SPEC)))
    if pool is None:
        raise ValueError("the pool was stored as something else")
    hash_ = template_hash(pool, world.pod_settings)

    async def create(number_of_pod: int) -> None:
        await world.api.create(PODS, namespace, build_pod(pool, number_of_pod, hash_, world.pod_settings))

    began = time.perf_counter()
    await in_parallel(create, range(PODS_IN_POOL), at_once=PARALLEL_WRITES)
    return time.perf_counter() - began


async def _fill(world: World, namespace: str, name: str) -> float:
    answered: list[float] = []
    with contextlib.closing(AuditLog(world.cluster.audit_log)) as log:

        async def full() -> bool:
            # A look at the log costs the API server nothing.
            answered[:] = [write.answered_at for write in log.writes(namespace) if write.verb == "create"]
            return len(answered) >= PODS_IN_POOL

        began = time.time()
        await world.api.create(POOLS, namespace, pool_object(namespace, name, **SPEC))
        await until(full, poll_seconds=0.5)
    return max(answered) - began
