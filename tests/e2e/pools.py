"""Pools of the real calls on a real cluster: their bots, what they are made of, and waiting for what they do."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.e2e.bound import QUIET_BOT
from tests.e2e.deployment import AGENT_IMAGE, KEYLESS_IMAGE, NAMESPACE, Deployment, Json

Anything = TypeVar("Anything")
MakePool = Callable[..., Awaitable[str]]
Kubectl = Callable[..., Awaitable[str]]

BOT_MAP = "bots"
_BEGINNING = "async def bot(runner_args):"
BOTS = {
    **{file.name: file.read_text() for file in (Path(__file__).parent / "bots").glob("*.py")},
    "syntax_error.py": "async def bot(:",
    "reads_body.py": QUIET_BOT.replace(_BEGINNING, f"{_BEGINNING}\n    name = runner_args.body.get('name')"),
    "holds_up.py": "import time\n" + QUIET_BOT.replace(_BEGINNING, f"{_BEGINNING}\n    time.sleep(600)"),
}
"""The files of a ConfigMap; the last three cannot be built."""

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


def is_ready(pod: Json) -> bool:
    """What the pod's condition says."""
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


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
    for process in processes:
        with suppress(ProcessLookupError):  # the first that dies takes the others with it
            os.kill(process, signal.SIGKILL)
