"""``python -m tests.bench.bare_watch NAMESPACE``: watches agent pods with the operator's HTTP session, and throws the bytes away.

The floor for the operator's CPU: what it costs to be told at all, one TLS record and one wake-up for each event. Reads the cluster from
``VOICEPOOL_KUBECONFIG``, ends with the process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvloop

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


if __name__ == "__main__":
    calm_garbage_collector()
    uvloop.run(follow(Path(os.environ["VOICEPOOL_KUBECONFIG"]), sys.argv[1]))
