"""``python -m tests.bench.gateway_process``: a whole gateway over HTTP, whose agents listen on another port and whose LiveKit is a double.

All else is as in the gateway's own process: its informers, parts, application, HTTP server and event loop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn
import uvloop

from tests.bench.gateway import gateway
from voicepool.gateway.app import create_app
from voicepool.main import calm_garbage_collector


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    async with gateway(options.kubeconfig, options.folder, options.namespace, options.agent_port) as services:
        config = uvicorn.Config(
            create_app(services),
            host="127.0.0.1",
            port=options.port,
            access_log=False,
            log_config=None,
            server_header=False,
        )
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--agent-port", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    calm_garbage_collector()
    uvloop.run(serve(parser.parse_args()))
