"""``python -m tests.bench.bare_watch NAMESPACE``: lists and watches agent pods with the operator's client, and throws everything away.

The floor for the operator's CPU: what it costs to be told at all. Reads the cluster from ``VOICEPOOL_KUBECONFIG``, ends with the process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvloop

from voicepool.kube.api import PODS
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.main import calm_garbage_collector
from voicepool.model import LABEL_POOL


async def follow(kubeconfig: Path, namespace: str) -> None:
    """Watch until the process is ended."""
    async with AiohttpKubeApi.connect(load_connection(kubeconfig)) as api:
        page = await api.list_page(PODS, namespace, label_selector=LABEL_POOL, limit=1)
        position = page["metadata"]["resourceVersion"]
        while True:
            async for event in api.watch(PODS, namespace, resource_version=position, label_selector=LABEL_POOL):
                position = event.object["metadata"]["resourceVersion"]


if __name__ == "__main__":
    calm_garbage_collector()
    uvloop.run(follow(Path(os.environ["VOICEPOOL_KUBECONFIG"]), sys.argv[1]))
