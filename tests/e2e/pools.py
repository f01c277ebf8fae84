"""Pools of the real calls on a real cluster: their bots, what they are made of, and waiting for what they do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.cluster.errors import ClusterError
from tests.e2e.bound import QUIET_BOT
from tests.e2e.broken_bots import CANNOT_BE_BUILT, FAILS_IN_CALLS
from tests.e2e.deployment import AGENT_IMAGE, KEYLESS_IMAGE, NAMESPACE, Deployment, Json, state_of

Anything = TypeVar("Anything")
MakePool = Callable[..., Awaitable[str]]
Kubectl = Callable[..., Awaitable[str]]

BOT_MAP = "bots"
BOTS = {
    **{file.name: file.read_text() for file in (Path(__file__).parent / "bots").glob("*.py")},
    **{file.name: file.read_text() for file in (Path(__file__).parents[2] / "examples").glob("*.py")},
    "quiet.py": QUIET_BOT,
    **CANNOT_BE_BUILT,
    **FAILS_IN_CALLS,
}
"""The files of a ConfigMap."""

KEYLESS: Json = {"image": KEYLESS_IMAGE, "resources": {"requests": {"cpu": "10m", "memory": "350Mi"}}}
REFERENCE: Json = {"image": AGENT_IMAGE, "resources": {"requests": {"cpu": "10m", "memory": "200Mi"}}}


def light(bot: str = "light.py", **environment: str) -> Json:
    """A container that runs one of the small bots."""
    return {
        "image": AGENT_IMAGE,
        "env": [{"name": name, "value": value} for name, value in {"BOT": f"/bots/{bot}", **environment}.items()],
        "volumeMounts": [{"name": "bots", "mountPath": "/bots"}],
        "resources": {"requests": {"cpu": "10m", "memory": "120Mi"}},
    }


def pool_of(name: str, container: Json, **spec: Any) -> Json:
    """A VoiceAgentPool."""
    volumes = [{"name": "bots", "configMap": {"name": BOT_MAP}}] if "volumeMounts" in container else []
    return {
        "apiVersion": "voicepool.dev/v1alpha1",
        "kind": "VoiceAgentPool",
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            **spec,
            "template": {"spec": {"volumes": volumes, "containers": [{"name": "agent", **container}]}},
        },
    }


@contextlib.asynccontextmanager
async def pools(deployment: Deployment) -> AsyncIterator[MakePool]:
    """Makes pools, each of which it waits for until it is warm unless told not to; all are gone in the end, with their pods."""
    made: list[str] = []

    async def make(name: str, container: Json, *, wait: bool = True, **spec: Any) -> str:
        made.append(name)
        await asyncio.to_thread(deployment.apply_pool, pool_of(name, container, **spec))
        if wait:
            await asyncio.to_thread(deployment.wait_until_ready, name)
        return name

    try:
        yield make
    finally:
        if made:
            await asyncio.to_thread(remove, deployment, made)


def remove(deployment: Deployment, names: Sequence[str]) -> None:
    """Delete pools, and their pods as well, whatever they carry."""
    kubectl, theirs = deployment.cluster.kubectl, f"voicepool.dev/pool in ({','.join(names)})"
    kubectl("delete", "vpool", *names, "--ignore-not-found")
    kubectl("delete", "pods", "--selector", theirs, "--grace-period=1")


async def until(
    what: str, look: Callable[[], Anything | None], deadline_seconds: float = 60, every_seconds: float = 0.3
) -> Anything:
    """The first thing that `look` finds; it may block. Fails, saying what was waited for, when the time is over."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        found = await asyncio.to_thread(look)
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"waited {deadline_seconds:g} s for {what}")
        await asyncio.sleep(every_seconds)


async def until_state(deployment: Deployment, pool: str, session: str, state: str) -> None:
    """Wait until the gateway says that a session has come so far. Raises TimeoutError."""
    async with asyncio.timeout(30):
        while (await deployment.session(pool, session)).state != state:  # noqa: ASYNC110 - a caller polls as well
            await asyncio.sleep(0.1)


async def until_over(deployment: Deployment, pod: str) -> Json:
    """The pod, when all of its containers have ended and none will be started again."""

    def over() -> Json | None:
        found = deployment.get("pod", pod)
        return found if found["status"]["phase"] in ("Succeeded", "Failed") else None

    return await until(f"the end of the pod {pod}", over)


def is_ready(pod: Json) -> bool:
    """What the pod's condition says."""
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


@contextlib.asynccontextmanager
async def away(deployment: Deployment, selector: str, namespace: str, word: bytes) -> AsyncIterator[None]:
    """Kill the processes of a Deployment, and keep Kubernetes from starting others meanwhile; in the end they are there again.

    Args:
        deployment: where.
        selector: labels of the Deployment and of its pods.
        namespace: of both.
        word: in the command lines of the processes.
    """

    async def kubectl(*arguments: str) -> str:
        return await asyncio.to_thread(deployment.cluster.kubectl, *arguments, "--namespace", namespace)

    (before,) = json.loads(await kubectl("get", "deployment", "--selector", selector, "--output", "json"))["items"]
    name, replicas = f"deployment/{before['metadata']['name']}", before["spec"]["replicas"]
    pods = await asyncio.to_thread(deployment.pods, selector, namespace)
    processes = await asyncio.to_thread(processes_in, [pod["metadata"]["uid"] for pod in pods], word)
    assert processes, f"{name} does not run"
    kill(processes)
    try:
        await kubectl("scale", name, "--replicas=0")
        await kubectl("wait", "--for=delete", "pod", "--selector", selector, "--timeout=60s")
        yield
    finally:
        await kubectl("scale", name, f"--replicas={replicas}")
        try:
            await kubectl("rollout", "status", name, "--timeout=60s")
        except ClusterError as error:
            state = await asyncio.to_thread(state_of, deployment.cluster, namespace)
            raise ClusterError(
                f"{name} is not there again", "read the lines above", f"{error.detail}\n{state}"
            ) from None


def processes_of(deployment: Deployment, component: str) -> set[int]:
    """The processes of all pods of a component of ours, as this machine sees them."""
    pods = deployment.pods(f"app.kubernetes.io/component={component}", NAMESPACE)
    return processes_in([pod["metadata"]["uid"] for pod in pods], b"voicepool")


def processes_in(pod_uids: Sequence[str], word: bytes = b"") -> set[int]:
    """The processes of pods, as this machine sees them, whose command line has this word in it."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            group = (folder / "cgroup").read_text().replace("_", "-")
            command = (folder / "cmdline").read_bytes()
            if word in command and any(uid in group for uid in pod_uids):
                found.add(int(folder.name))
    return found


def kill(processes: set[int]) -> None:
    """End them with SIGKILL."""
    for process in processes:
        with suppress(ProcessLookupError):  # the first that dies takes the others with it
            os.kill(process, signal.SIGKILL)
