"""Agents of the reference bot in pods of a real node: one alone, and ten that wait side by side.

The node is this machine, so its `/proc` shows the agents' processes. Nothing is called: the providers' keys are made up, and a parked agent connects
to nobody. What ten agents share are the file pages of one image; PSS divides them among those who have them mapped.
"""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figures import Figure, over_rounds
from tests.bench.processes import cpu_seconds, metric_sum
from tests.bench.report import Row
from tests.bench.world import load_average, until
from tests.cluster.images import build_all
from tests.cluster.progress import Progress
from tests.cluster.tool import open_cluster
from tests.e2e.deployment import AGENT_IMAGE, LIVEKIT_IMAGE, OPERATOR_IMAGE, Deployment, Json, install, load

NAME = "node"
POOL = "waiting"
STARTS = 5
AGENTS = 10
IDLE_SECONDS = 60.0
SETTLE_SECONDS = 10.0
READY_GOAL_SECONDS = 1.2
MEMORY_GOAL_MEGABYTES = 165.0
IDLE_GOAL_PERCENT = 0.5
KEYS = ("ASSEMBLYAI_API_KEY", "GROQ_API_KEY", "INWORLD_API_KEY")


@dataclass(frozen=True, slots=True)
class Process:
    """An agent's process, in a pod."""

    pid: int
    address: str
    """Of its pod."""

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, as the agent shows it to Prometheus."""
        with urllib.request.urlopen(f"http://{self.address}:8080/metrics", timeout=5) as answer:
            return metric_sum(answer.read().decode(), name)

    def memory_megabytes(self) -> dict[str, float]:
        """Resident, proportional and private memory."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
        return {
            "resident": sizes["Rss"],
            "proportional": sizes["Pss"],
            "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
        }


async def measure(folder: Path, progress: Progress) -> list[Row]:
    """Run it; takes about four minutes, and needs root."""
    build_all(progress)
    cluster = open_cluster(f"bench-{os.getpid()}", "native", progress=progress)
    cluster.up()
    try:
        load(cluster, progress, (OPERATOR_IMAGE, AGENT_IMAGE, LIVEKIT_IMAGE))
        deployment = install(cluster, progress)
        machine_load = load_average()
        with progress.step(f"{STARTS} starts of one agent", 6 * STARTS):
            rows = await _alone(deployment, machine_load)
        with progress.step(f"{AGENTS} agents side by side", 30 + IDLE_SECONDS):
            rows += await _together(deployment, machine_load)
        return rows
    finally:
        cluster.down()


async def _alone(deployment: Deployment, machine_load: float) -> list[Row]:
    ready, parked = [], []
    for _ in range(STARTS):
        await _scaled(deployment, 0)
        await _scaled(deployment, 1)
        (process,) = await asyncio.to_thread(_processes, deployment)
        ready.append(process.metric("voicepool_agent_startup_seconds"))
        parked.append(process.metric("voicepool_agent_parked_bytes") / 1e6)
    return [
        Row(NAME, "one agent: process start to parked", over_rounds(ready), "s", READY_GOAL_SECONDS, load=machine_load),
        Row(NAME, "one agent: memory parked", over_rounds(parked), "MB", MEMORY_GOAL_MEGABYTES, load=machine_load),
    ]


async def _together(deployment: Deployment, machine_load: float) -> list[Row]:
    await _scaled(deployment, 0)
    began = time.monotonic()
    await _scaled(deployment, AGENTS)
    all_ready = time.monotonic() - began
    processes = await asyncio.to_thread(_processes, deployment)
    await asyncio.sleep(SETTLE_SECONDS)
    before = [cpu_seconds(process.pid) for process in processes]
    await asyncio.sleep(IDLE_SECONDS)
    percent = [
        100 * (cpu_seconds(process.pid) - used) / IDLE_SECONDS for process, used in zip(processes, before, strict=True)
    ]
    memory = [process.memory_megabytes() for process in processes]
    total = sum(one["proportional"] for one in memory)

    def row(what: str, figure: Figure, unit: str, goal: float | None = None) -> Row:
        return Row(NAME, f"{AGENTS} agents: {what}", figure, unit, goal, load=machine_load)

    return [
        row("from the scale to the last one warm", Figure(all_ready, all_ready, all_ready, 1), "s"),
        row("CPU of each while it waits", over_rounds(percent), "%", IDLE_GOAL_PERCENT),
        *(row(f"{kind} memory of each", over_rounds([one[kind] for one in memory]), "MB") for kind in memory[0]),
        row("memory of all together", Figure(total, total, total, 1), "MB"),
    ]


async def _scaled(deployment: Deployment, replicas: int) -> None:
    """Have so many warm agents, and none that is going away."""
    await asyncio.to_thread(deployment.apply_pool, _pool(replicas))

    async def done() -> bool:
        pods = await asyncio.to_thread(deployment.pods_of, POOL)
        return len(pods) == replicas and all(map(_is_ready, pods))

    await until(done, poll_seconds=0.05)


def _is_ready(pod: Json) -> bool:
    conditions = pod["status"].get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _processes(deployment: Deployment) -> list[Process]:
    """The agents' processes: those whose environment names a pod of the pool."""
    addresses = {pod["metadata"]["uid"]: pod["status"]["podIP"] for pod in deployment.pods_of(POOL)}
    found: list[Process] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        variables = dict(entry.partition(b"=")[::2] for entry in environment.split(b"\0"))
        address = addresses.get(variables.get(b"VOICEPOOL_POD_UID", b"").decode())
        # The container's first process, which only waits for the agent, has the same environment.
        if address and command.startswith(b"python3\0"):
            found.append(Process(int(folder.name), address))
    return found


def _pool(replicas: int) -> Json:
    container = {
        "name": "agent",
        "image": AGENT_IMAGE,
        "env": [{"name": key, "value": "not-a-key"} for key in KEYS],
        "resources": {"requests": {"cpu": "10m", "memory": "120Mi"}},
    }
    return {
        "apiVersion": "voicepool.dev/v1alpha1",
        "kind": "VoiceAgentPool",
        "metadata": {"name": POOL},
        "spec": {"replicas": replicas, "maxPods": AGENTS, "template": {"spec": {"containers": [container]}}},
    }
