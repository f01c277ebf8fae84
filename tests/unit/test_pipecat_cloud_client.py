"""Pipecat Cloud's own client, unmodified, against a gateway on a real socket. It is told only where its API is."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pipecatcloud.api import _API
from pipecatcloud.exception import AgentStartError
from pipecatcloud.session import Session, SessionParams
from tests.unit.fakes import POOLS
from tests.unit.gateways import API_KEY, SCOPED_KEY, World, until, world
from tests.unit.loopback import served
from tests.unit.test_gateway_streams import end

ORGANIZATION = "calls"
"""A namespace."""


@pytest.fixture
async def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        made.pool(replicas=2)
        made.pods(2)
        made.kube.edit(POOLS, "demo", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
        async with served(await made.gateway()) as address:
            monkeypatch.setenv("PIPECAT_API_HOST", address)
            yield made


async def test_a_session_is_started_with_a_body(here: World) -> None:
    answer = await Session("demo", API_KEY, SessionParams(data={"name": "Ada"})).start()
    (agent,) = here.agents.with_session(answer["sessionId"])
    assert agent.claims[0]["body"] == {"name": "Ada"}


async def test_a_start_that_is_refused_is_an_error_with_our_words(here: World) -> None:
    with pytest.raises(AgentStartError) as caught:
        await Session("demo", "wrong").start()
    assert caught.value.error_code == "UNAUTHENTICATED"


async def test_sessions_are_listed_looked_up_and_ended(here: World) -> None:
    client = _API(API_KEY)
    session = (await Session("demo", API_KEY).start())["sessionId"]
    listed, error = await client.agent_sessions("demo", ORGANIZATION)
    assert (error, listed["total_count"], [one["sessionId"] for one in listed["sessions"]]) == (None, 1, [session])
    nothing, _ = await client.agent_sessions("demo", ORGANIZATION, end_state="completed")
    assert nothing["sessions"] == []
    one, _ = await client.agent_session("demo", session, ORGANIZATION)
    assert (one["sessionId"], one["endState"]) == (session, "active")
    ended, _ = await client.agent_session_terminate("demo", session, ORGANIZATION)
    assert ended == {"status": "terminated", "session_id": session}
    assert here.agents.with_session(session)[0].ends == ["cancel"]


async def test_the_log_of_a_session_is_read(here: World) -> None:
    started = await Session("demo", API_KEY).start()
    here.kube.logs[started["agent"]["pod"]].write("hello", 7)
    log, _ = await _API(API_KEY).agent_logs("demo", ORGANIZATION, session_id=started["sessionId"])
    assert log == {"logs": [{"timestamp": "2026-03-01T12:00:07.000000000Z", "log": "hello"}]}


async def test_a_pool_is_an_agent_with_a_status(here: World) -> None:
    client = _API(API_KEY)
    await Session("demo", API_KEY).start()
    agents, _ = await client.agents(ORGANIZATION)
    assert [agent["name"] for agent in agents] == ["demo"]
    status, _ = await client.agent("demo", ORGANIZATION)
    assert (status["ready"], status["activeSessionCount"]) == (True, 1)
    assert status["autoScaling"] == {"minReplicas": 2, "maxReplicas": 50}


async def test_a_key_sees_its_own_pools_only(here: World) -> None:
    client = _API(SCOPED_KEY, is_cli=True)
    for ask in (
        client.agent("demo", ORGANIZATION),
        client.agent_sessions("demo", ORGANIZATION),
        client.agent_session("demo", "one", ORGANIZATION),
        client.agent_session_terminate("demo", "one", ORGANIZATION),
        client.agent_logs("demo", ORGANIZATION, session_id="one"),
    ):
        answer, error = await ask
        assert (answer, error["code"]) == (None, "POOL_NOT_ALLOWED")
    assert await client.agents(ORGANIZATION) == ([], None)


async def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """The command line, in a process of its own, with no settings but these."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HOME": str(tmp_path),
        "COLUMNS": "200",
        "PIPECAT_API_HOST": os.environ["PIPECAT_API_HOST"],
        "PIPECAT_TOKEN": API_KEY,
        "PIPECAT_ORG": ORGANIZATION,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from pipecatcloud.cli.entry_point import entrypoint_cli_typer as cli; cli()",
        *arguments,
        env=environment,
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_command_line_shows_what_it_shows_of_its_cloud(here: World, tmp_path: Path) -> None:
    code, output = await run(tmp_path, "agent", "start", "demo", "--force", "--api-key", API_KEY)
    assert code == 0, output
    (pod,) = here.kube.bound()
    session = pod["metadata"]["labels"]["voicepool.dev/session"]
    here.kube.logs[pod["metadata"]["name"]].write("the agent's own words")
    asked: list[tuple[list[str], list[str]]] = [
        (["agent", "list"], ["demo"]),
        (["agent", "status", "demo"], ["example.org/agent:1"]),
        (["agent", "sessions", "demo"], [session[:8], "Active"]),
        (["agent", "sessions", "demo", "--id", session], ["Active"]),
        (["agent", "logs", "demo", "--session-id", session], ["the agent's own words"]),
        (["agent", "stop", "demo", "--session-id", session, "--force"], ["stopped"]),
    ]
    for arguments, words in asked:
        code, output = await run(tmp_path, *arguments)
        assert code == 0, output
        for word in words:
            assert word in output, (arguments, output)
    end(here, pod["metadata"]["name"], "cancelled")
    await until(lambda: here.kube.pod(pod["metadata"]["name"])["status"]["phase"] == "Succeeded")
    code, output = await run(tmp_path, "agent", "sessions", "demo", "--end-state", "terminated")
    assert code == 0, output
    assert "Terminated" in output
