"""Sessions by what people have at hand: curl, and the package `pipecatcloud` with its command line."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import pytest
from tests.e2e.caller import Caller
from tests.e2e.deployment import Deployment
from tests.e2e.pools import MakePool, light

pytestmark = pytest.mark.cluster

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "starting-a-session.md"


async def output_of(*command: str, folder: Path, **environment: str) -> str:
    """What a program writes, that must end well; it has no settings but these."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    written, _ = await process.communicate()
    assert process.returncode == 0, written.decode()
    return written.decode()


async def test_with_curl_as_in_the_guide_a_session_is_started_heard_shown_and_ended(
    deployment: Deployment, make_pool: MakePool, tmp_path: Path
) -> None:
    pool = await make_pool("curl", light())
    # Not on the command line, which everybody on the machine can read.
    (tmp_path / "key").write_text(f"X-API-Key: {deployment.api_key}\n")

    async def curl(*arguments: str) -> dict[str, object]:
        common = ("curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "60", "--header", "@key")
        answered: dict[str, object] = json.loads(await output_of(*common, *arguments, folder=tmp_path))
        return answered

    command = re.search(r"^```sh\n(curl .*?)^curl ", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert command is not None
    here = {
        "curl": "curl --silent --show-error",
        "https://voice.example.com": deployment.gateway_url,
        "support-line": pool,
    }
    words = re.sub("|".join(here), lambda word: here[word[0]], command[1])
    started = json.loads(await output_of("sh", "-c", words, folder=tmp_path, KEY=deployment.api_key))
    async with Caller(str(started["url"]), str(started["token"])) as caller:
        assert (await caller.hear()).seconds > 0.5
        session = f"{deployment.gateway_url}/v1/agents/{pool}/sessions/{started['sessionId']}"
        assert (await curl(session))["state"] == "joined"
        assert (await curl("--request", "DELETE", session))["status"] == "terminated"
        async with asyncio.timeout(30):
            await caller.agent_left.wait()


async def test_with_pipecat_clouds_package_a_session_is_started_heard_shown_and_ended(
    deployment: Deployment, make_pool: MakePool, tmp_path: Path
) -> None:
    pool = await make_pool("pipecat-cloud", light())
    settings = {
        "PIPECAT_API_HOST": deployment.gateway_url,
        "PIPECAT_TOKEN": deployment.api_key,
        "PIPECAT_ORG": "default",
        "COLUMNS": "200",
    }
    program = (
        "import asyncio, json, os; from pipecatcloud.session import Session, SessionParams; "
        f"session = Session({pool!r}, os.environ['PIPECAT_TOKEN'], SessionParams(data={{'name': 'Ada'}})); "
        "print(json.dumps(asyncio.run(session.start())))"
    )
    said = await output_of(sys.executable, "-c", program, folder=tmp_path, **settings)
    started = json.loads(said.splitlines()[-1])
    cli = "from pipecatcloud.cli.entry_point import entrypoint_cli_typer as cli; cli()"

    async def agent(*arguments: str) -> str:
        return await output_of(sys.executable, "-c", cli, "agent", *arguments, folder=tmp_path, **settings)

    async with Caller(started["url"], started["token"]) as caller:
        assert (await caller.hear()).seconds > 0.5
        assert started["sessionId"][:8] in await agent("sessions", pool)
        assert "stopped" in await agent("stop", pool, "--session-id", started["sessionId"], "--force")
        async with asyncio.timeout(30):
            await caller.agent_left.wait()
