"""``python -m tests.bench.bare_watch NAMESPACE [copy]``: watches agent pods with the operator's HTTP session, and throws the bytes away.

The floor for the operator's CPU: what it costs to be told at all, one TLS record and one wake-up for each event. With ``copy`` the events are read and
taken into the operator's own copy of the pods, and nobody is told of them: what remains to the operator's process is its controller. Reads the cluster
from ``VOICEPOOL_KUBECONFIG``, ends with the process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvloop

from voicepool.copies import pod_informer
from voicepool.kube.api import PODS
from voicepool.kube.client import AiohttpKubeApi, load_connection, make_session
from voicepool.main import calm_garbage_collector
from voicepool.model import LABEL_POOL


async def follow(kubeconfig: Path, namespace: str) -> None:
    """Watch until the process is ended."""
    connection = load_connection(kubeconfig)
    async with AiohttpKubeApi.connect(connection) as api, make_session(connection) as session:
        while True:
            page = await api.list_page(PODS, namespace, label_selector=LABEL_POOL, limit=1)
            query = {"watch": "1", "labelSelector": LABEL_POOL, "resourceVersion": page["metadata"]["resourceVersion"]}
            async with session.get(PODS.path(namespace), params=query, timeout=None) as response:
                async for _ in response.content.iter_any():
                    pass


async def copy(kubeconfig: Path, namespace: str) -> None:
    """Keep the operator's copy of the pods until the process is ended."""
    async with AiohttpKubeApi.connect(load_connection(kubeconfig)) as api:
        await pod_informer(api, namespace).run()


if __name__ == "__main__":
    calm_garbage_collector()
    watch = copy if sys.argv[2:] == ["copy"] else follow
    uvloop.run(watch(Path(os.environ["VOICEPOOL_KUBECONFIG"]), sys.argv[1]))
