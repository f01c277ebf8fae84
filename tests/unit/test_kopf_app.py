"""The operator's process before an API server that takes it for nobody."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

import yaml
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

REQUEST_SECONDS = 30.0
LOOK_SECONDS = 2.0


async def test_an_operator_whose_token_is_refused_asks_again_once_a_second_and_says_so(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()
    again = asyncio.Event()

    async def refuse(request: web.Request) -> web.Response:
        asked[request.path] += 1
        if asked["/apis"] > 1:
            again.set()
        return web.json_response({"kind": "Status", "code": 401, "reason": "Unauthorized"}, status=401)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", refuse)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    context = {"name": "here", "context": {"cluster": "here", "user": "nobody"}}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [context],
        "clusters": [{"name": "here", "cluster": {"server": f"http://{host}:{port}"}}],
        "users": [{"name": "nobody", "user": {"token": "expired"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    public_key = Ed25519PrivateKey.generate().public_key()
    (tmp_path / "public.pem").write_bytes(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    settings = {
        "VOICEPOOL_KUBECONFIG": str(tmp_path / "kubeconfig"),
        "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE": str(tmp_path / "public.pem"),
        "VOICEPOOL_HEALTH_HOST": "127.0.0.1",
        "VOICEPOOL_HEALTH_PORT": "0",
    }
    operator = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "voicepool.main", "operator"),
        env={**os.environ, **settings},
        stderr=asyncio.subprocess.STDOUT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            await again.wait()
        before = asked["/apis"]
        await asyncio.sleep(LOOK_SECONDS)
        assert asked["/apis"] - before <= LOOK_SECONDS + 1
    finally:
        operator.kill()
        log, _ = await operator.communicate()
        await runner.cleanup()
    assert b"the API server does not accept our credentials, trying again" in log
    assert b"Traceback" not in log
