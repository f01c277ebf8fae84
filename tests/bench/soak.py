"""Half an hour of calls: what operator and gateways have in memory, who waits, and what became of every call.

Everybody around them is played as in the storms of `tests/cluster`, and nothing is shaken. VOICEPOOL_SOAK_SECONDS (1800) is how long. It runs only when it
is named.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from tests.bench.figures import blocks, over_rounds
from tests.bench.processes import metric_sum
from tests.bench.report import Row, number
from tests.bench.world import load_average
from tests.cluster.chaos.judge import FaultKind
from tests.cluster.chaos.processes import Process
from tests.cluster.chaos.stage import SETTLE_SECONDS, Stage, accounts, running, stage, until
from tests.cluster.progress import Progress
from tests.cluster.tool import open_cluster

NAME = "soak"
CALLS_PER_SECOND = 10.0
LOOK_SECONDS = 5.0
GROWTH_GOAL = 1.05
_MEBIBYTE = 1024 * 1024


async def measure(folder: Path, progress: Progress) -> list[Row]:
    """Run it."""
    seconds = float(os.environ.get("VOICEPOOL_SOAK_SECONDS") or 1800)
    cluster = open_cluster(f"bench-{os.getpid()}", "native", control_plane_only=True, progress=progress)
    await asyncio.to_thread(cluster.up)
    try:
        load = load_average()
        with accounts(cluster, folder) as acts:
            async with stage(cluster, acts, folder, operators=1) as here:
                with progress.step("calls", seconds):
                    return await _rows(here, seconds, load)
    finally:
        await asyncio.to_thread(cluster.down)


async def _rows(here: Stage, seconds: float, load: float) -> list[Row]:
    processes = {"operator": here.operators[0], "one gateway": here.gateways[0], "the other": here.gateways[1]}
    memory: dict[str, list[float]] = {name: [] for name in processes}
    waiting: list[float] = []
    async with running(here.callers.keep_calling(CALLS_PER_SECOND)):
        loop = asyncio.get_running_loop()
        began = loop.time()
        for look in range(1, int(seconds / LOOK_SECONDS) + 1):
            await asyncio.sleep(began + look * LOOK_SECONDS - loop.time())
            for name, process in processes.items():
                memory[name].append(process.memory_bytes() / _MEBIBYTE)
            waiting.append(sum([await _waiting(gateway) for gateway in here.gateways]))
    await here.callers.finish()
    await until(here.settled, SETTLE_SECONDS)
    verdict = here.verdict(0)
    calls, failures = here.callers, sum(here.callers.failures.values())
    others = [fault for fault in verdict.faults if fault.kind is not FaultKind.DOUBLE_BIND]
    return [
        *(_growth(name, values, load) for name, values in memory.items()),
        Row(NAME, "callers who wait, the most at a look", over_rounds([max(waiting)]), "", load=load),
        Row(NAME, "callers who wait, in the last sixth", over_rounds(blocks(waiting, 6)[5]), "", load=load),
        Row(NAME, "calls", over_rounds([len(calls.answered)]), "", beside=f"{calls.asked} callers", load=load),
        Row(NAME, "callers without an agent", over_rounds([failures]), "", 0, str(dict(calls.failures)), load),
        Row(NAME, "sessions with two pods", over_rounds([verdict.count(FaultKind.DOUBLE_BIND)]), "", goal=0, load=load),
        Row(
            *(NAME, "other faults that the audit log shows", over_rounds([len(others)]), ""),
            goal=0,
            beside="; ".join(f"{fault.kind}: {fault.words}" for fault in others[:3]),
            load=load,
        ),
    ]


def _growth(name: str, values: Sequence[float], load: float) -> Row:
    """The last sixth of the time beside the second: in the first caches are filled."""
    sixths = blocks(values, 6)
    early, late = over_rounds(sixths[1]).value, over_rounds(sixths[5]).value
    words = f"{number(late)} MiB, {number(early)} MiB"
    return Row(
        NAME,
        f"memory of {name}, the last sixth of the time",
        over_rounds([late / early]),
        "x",
        GROWTH_GOAL,
        words,
        load,
    )


async def _waiting(gateway: Process) -> float:
    return metric_sum(await gateway.ask("/metrics") or "", "voicepool_gateway_queue_waiters")
