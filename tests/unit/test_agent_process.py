"""The agent as a process: failed builds, the bind contract on the wire, signals, limits; only loopback."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.agent_process import BOTS, AgentProcess, orders_to_refuse, run_agent
from tests.e2e.bound import QUIET_BOT

NOWHERE = "ws://127.0.0.1:9"
"""Port 9 of the loopback address: nobody listens."""

SILENT_BOT = (
    """
from loguru import logger

ready = True

def readyz():
    return ready
"""
    + QUIET_BOT
    + """\
    logger.info(f"body {runner_args.body}, session {runner_args.session_id}, room {runner_args.room_name}")
"""
)

WITHOUT_LIVEKIT = """
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.workers.runner import WorkerRunner

async def bot(runner_args):
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(PipelineWorker(Pipeline([])))
    await runner.run()
"""

CHANGES_ITS_MIND = (
    """
answers = [False, None, None, True, True]

def readyz():
    answer = answers.pop(0)
    if answer is None:
        raise OSError("no disk")
    return answer
"""
    + QUIET_BOT
)

READS_BODY = QUIET_BOT.replace("async def bot(runner_args):", "async def bot(runner_args):\n    READ")
READS_BODY_LINE = READS_BODY.splitlines().index("    READ") + 1
HOLDS_UP = "import time\n" + QUIET_BOT.replace(
    "async def bot(runner_args):", "async def bot(runner_args):\n    time.sleep(60)"
)
HOLDS_UP_LINE = HOLDS_UP.splitlines().index("    time.sleep(60)") + 1


@pytest.fixture
async def parked(tmp_path: Path) -> AsyncIterator[AgentProcess]:
    """A parked agent around the silent bot, with short limits."""
    (tmp_path / "bot.py").write_text(SILENT_BOT)
    async with run_agent("bot.py", tmp_path, {"VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS": "1.5"}) as agent:
        await agent.wait_until_ready()
        yield agent


def claims(**changes: Any) -> dict[str, Any]:
    return {"session": "s-1", "room": "r-1", "url": NOWHERE, "token": "canary-token", "pool": "demo", **changes}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("async def bot(:", "SyntaxError"),
        ("x = 1", "must have `async def bot(runner_args)`"),
        ("async def bot(runner_args): ...", "returned without running a pipeline"),
        ("async def bot(runner_args): raise ValueError('no voice')", "ValueError: no voice (line 1 of bot.py)"),
        (WITHOUT_LIVEKIT, "without a LiveKit transport"),
    ],
    ids=["syntax error", "no bot", "returns", "raises", "no LiveKit"],
)
async def test_a_bot_that_cannot_be_built_is_one_clear_line(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "bot.py").write_text(source)
    async with run_agent("bot.py", tmp_path) as agent:
        assert await agent.exit_code() == 1
    assert words in agent.termination_message
    assert "\n" not in agent.termination_message
    assert words in agent.log.replace("\\", "")
    assert "Traceback" not in agent.log


@pytest.mark.parametrize("read", ["name = runner_args.body.get('name', 'you')", "name = runner_args.body['name']"])
async def test_a_bot_that_reads_the_body_while_it_is_built_is_never_ready_and_told_what_to_do(
    tmp_path: Path, read: str
) -> None:
    (tmp_path / "bot.py").write_text(READS_BODY.replace("READ", read))
    async with run_agent("bot.py", tmp_path) as agent:
        assert await agent.exit_code() == 1
    assert agent.termination_message == (
        f"the bot bot.py reads runner_args.body while it is being built (line {READS_BODY_LINE} of bot.py), when there"
        " is no caller yet; set spec.warmth to Imported, or read it in on_client_connected"
    )
    assert agent.termination_message in agent.log
    assert '"parked"' not in agent.log


async def test_a_bot_that_holds_up_the_event_loop_while_it_is_built_is_given_up_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(HOLDS_UP)
    async with run_agent("bot.py", tmp_path, {"VOICEPOOL_STARTUP_BLOCKED_TIMEOUT_SECONDS": "5"}) as agent:
        assert await agent.exit_code() == 1
    assert agent.termination_message == (
        f"the bot bot.py has held up the event loop for 5 s in line {HOLDS_UP_LINE} of bot.py;"
        " await there, or put it into asyncio.to_thread()"
    )
    assert agent.termination_message in agent.log
    assert "Traceback" not in agent.log


async def test_the_reference_bot_without_keys_names_all_of_them_and_where_they_come_from(tmp_path: Path) -> None:
    async with run_agent(BOTS / "reference" / "bot.py", tmp_path, {"GROQ_API_KEY": "gsk-canary"}) as agent:
        assert await agent.exit_code() == 1
    assert "set ASSEMBLYAI_API_KEY, INWORLD_API_KEY in the Secret" in agent.termination_message
    assert "spec.template.spec.containers[agent].envFrom" in agent.termination_message
    assert "canary" not in agent.log + agent.termination_message


@pytest.mark.parametrize("fails", [True, False], ids=["a bot that fails", "a bot that is built"])
async def test_a_key_that_the_bot_reads_from_a_file_is_kept_out_of_the_log(tmp_path: Path, fails: bool) -> None:
    (tmp_path / ".env").write_text("PROVIDER_API_KEY=canary-key\n")
    source = "import os\nfrom dotenv import load_dotenv\nload_dotenv(override=True)\n" + SILENT_BOT.replace(
        "async def bot(runner_args):", 'async def bot(runner_args):\n    logger.info(os.environ["PROVIDER_API_KEY"])'
    )
    (tmp_path / "bot.py").write_text(source + 'raise ValueError(os.environ["PROVIDER_API_KEY"])\n' * fails)
    async with run_agent("bot.py", tmp_path) as agent:
        if fails:
            assert await agent.exit_code() == 1
            assert "ValueError: [hidden] (line" in agent.termination_message
        else:
            await agent.wait_until_ready()
            assert "[hidden]" in agent.log
    assert "canary" not in agent.log


async def test_a_wrong_environment_is_one_clear_line(tmp_path: Path) -> None:
    async with run_agent("bot.py", tmp_path, {"VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "canary"}) as agent:
        assert await agent.exit_code() == 1
    assert "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY" in agent.termination_message
    assert "canary" not in agent.log
    assert "Traceback" not in agent.log


async def test_what_is_refused_leaves_the_agent_as_warm_as_before(parked: AgentProcess) -> None:
    for order, status, code in orders_to_refuse(parked.gateway, parked.pod_uid, **claims()):
        answer = await parked.post("/bind", order)
        assert (answer[0], answer[1]["code"]) == (status, code)
        assert set(answer[1]) == {"error", "code"}
        assert (await parked.get("/readyz"))[0] == 200
    assert (await parked.end("s-1", "cancel"))[1]["code"] == "NOT_BOUND"
    _, status_now = await parked.get("/status")
    assert (status_now["state"], status_now["session"], status_now["pod_uid"]) == ("parked", None, parked.pod_uid)


async def test_a_bound_agent_takes_no_other_session_and_says_the_same_of_its_own_again(parked: AgentProcess) -> None:
    order = parked.gateway.sign(parked.pod_uid, **claims(), jti="one-use")
    assert await parked.post("/bind", order) == (202, {"state": "accepted", "session": "s-1"})
    assert (await parked.get("/readyz"))[0] == 503
    assert await parked.post("/bind", order) == (200, {"state": "accepted", "session": "s-1"})
    assert await parked.bind(**claims()) == (200, {"state": "accepted", "session": "s-1"})
    assert (await parked.bind(**claims(session="s-2")))[1]["code"] == "ALREADY_BOUND"
    assert (await parked.bind(**claims(session="s-2"), jti="one-use"))[1]["code"] == "INVALID_ASSIGNMENT"
    assert (await parked.get("/livez"))[0] == 200


async def test_a_livekit_server_that_is_not_there_ends_the_session_in_bounded_time(parked: AgentProcess) -> None:
    await parked.bind(**claims(body={"name": "Ada"}))
    _, status = await parked.get("/status")
    assert (status["state"], status["waiting_for"]) == ("accepted", "LiveKit")
    _, status = await parked.get("/status?wait=joined&timeout=20")
    assert (status["state"], status["waiting_for"]) == ("ending", None)
    assert await parked.exit_code() == 0
    assert parked.summary["session"] == "s-1"
    assert parked.summary["reason"] == "not-joined"
    assert parked.summary["joinedSeconds"] is None
    assert "canary-token" not in parked.log + parked.termination_message


async def test_a_session_lasts_no_longer_than_the_assignment_says(parked: AgentProcess) -> None:
    await parked.bind(**claims(maxDurationSeconds=1))
    assert await parked.exit_code() == 0
    assert parked.summary["reason"] == "max-duration"


async def test_the_arguments_that_the_bot_was_built_with_are_filled_at_the_bind(parked: AgentProcess) -> None:
    await parked.bind(**claims(body={"name": "Ada"}))
    await parked.end("s-1", "cancel")
    assert await parked.exit_code() == 0
    assert parked.summary["reason"] == "cancelled"
    assert "body {'name': 'Ada'}, session s-1, room r-1" in parked.log


async def test_a_parked_agent_that_is_told_to_stop_exits_at_once(parked: AgentProcess) -> None:
    parked.process.terminate()
    assert await parked.exit_code() == 0
    assert not (parked.folder / "termination").exists()


async def test_a_bot_that_wants_the_signals_for_itself_does_not_get_them(tmp_path: Path) -> None:
    source = SILENT_BOT.replace("handle_sigint=runner_args.handle_sigint", "handle_sigint=True, handle_sigterm=True")
    assert source != SILENT_BOT
    (tmp_path / "bot.py").write_text(source)
    async with run_agent("bot.py", tmp_path) as agent:
        await agent.wait_until_ready()
        agent.process.terminate()
        assert await agent.exit_code() == 0


async def test_a_bound_agent_that_is_told_to_stop_lets_its_session_go_on(parked: AgentProcess) -> None:
    await parked.bind(**claims())
    parked.process.terminate()
    assert (await parked.get("/status"))[1]["state"] == "accepted"
    await parked.end("s-1", "cancel")
    assert await parked.exit_code() == 0
    assert parked.summary["reason"] == "cancelled"


async def test_metrics_tell_where_the_start_went(parked: AgentProcess) -> None:
    phases = [
        f'voicepool_agent_startup_seconds{{phase="{name}"}}' for name in ("interpreter", "imports", "build", "warm-up")
    ]
    assert all([await parked.metric(phase) > 0 for phase in phases])
    assert await parked.metric('voicepool_agent_state{voicepool_agent_state="parked"}') == 1
    assert await parked.metric("voicepool_agent_parked_bytes") > 1e7
    assert math.isnan(await parked.metric("voicepool_agent_joined_seconds"))
    await parked.post("/bind", b"nonsense")
    assert await parked.metric('voicepool_agent_refused_orders_total{code="MALFORMED"}') == 1


async def test_a_bot_whose_readyz_says_no_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(SILENT_BOT.replace("ready = True", "ready = False"))
    async with run_agent("bot.py", tmp_path) as agent:
        await agent.wait_until_state("parked")
        for _ in range(3):
            assert (await agent.get("/readyz"))[0] == 503
        agent.process.terminate()
        await agent.exit_code()
    assert agent.log.count("readyz() of the bot bot.py says no; the agent is not Ready until it agrees") == 1


async def test_a_bot_whose_readyz_changes_its_mind_is_heard_of_at_each_change(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(CHANGES_ITS_MIND)
    async with run_agent("bot.py", tmp_path) as agent:
        await agent.wait_until_state("parked")
        assert [(await agent.get("/readyz"))[0] for _ in range(5)] == [503, 503, 503, 200, 200]
        agent.process.terminate()
        await agent.exit_code()
    assert agent.log.count("readyz() of the bot bot.py says no; ") == 1
    assert agent.log.count("the bot bot.py failed: OSError: no disk (line 7 of bot.py); ") == 1
    assert agent.log.count("readyz() of the bot bot.py agrees") == 1


async def test_an_agent_that_is_killed_while_its_session_ends_has_said_why_it_was_ending(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(f"import asyncio\n{QUIET_BOT}    await asyncio.sleep(60)\n")
    async with run_agent("bot.py", tmp_path) as agent:
        await agent.wait_until_ready()
        await agent.bind(**claims())
        await agent.end("s-1", "cancel")
        await agent.wait_until_state("ending")
        agent.process.kill()
        await agent.exit_code()
    assert (agent.summary["session"], agent.summary["reason"]) == ("s-1", "cancelled")


async def test_a_bot_that_sets_up_its_own_log_as_pipecats_examples_do_is_built(tmp_path: Path) -> None:
    setup = 'import sys\nfrom loguru import logger\nlogger.remove(0)\nlogger.add(sys.stderr, level="DEBUG")\n'
    (tmp_path / "bot.py").write_text(setup + SILENT_BOT)
    async with run_agent("bot.py", tmp_path) as agent:
        await agent.wait_until_ready()
        agent.process.terminate()
        await agent.exit_code()
    assert "DEBUG" not in agent.log.partition('"parked"')[2]
    assert '"message": "parked"' in agent.log
