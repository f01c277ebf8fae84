"""What was said and what is secret is in nothing that an agent writes or shows, at no level, whatever goes wrong."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.e2e.agent_process import BOTS, AgentProcess, run_agent
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import Fault, Providers

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]

HEARD = "my secret word is kookaburra"
ANSWERED = "I shall never write down kingfisher"
QUOTED = "the model was about to say cassowary"
"""Said by nobody, and yet in a provider's message."""
NAME = "Rosella"
KEY = "canary-key-of-a-provider"
PROMPT = "You never mention the word lyrebird."
CANARIES = ("kookaburra", "kingfisher", "cassowary", NAME, KEY, "lyrebird")
TOKEN = re.compile(r"eyJ[\w-]{10,}\.[\w-]{10,}")


async def shown(agent: AgentProcess) -> str:
    """Everything that an agent shows over HTTP."""
    pages = []
    for path in ("/metrics", "/status", "/readyz", "/livez"):
        async with agent.http.get(f"http://127.0.0.1:{agent.port}{path}") as response:
            pages.append(await response.text())
    return "\n".join(pages)


async def goes_wrong(providers: Providers, provider: str, fault: Fault, babble: str) -> None:
    """Give a provider a fault, alone, and wait until it has shown."""
    providers.faults, providers.babble = {provider: fault}, babble
    before = providers.gone_wrong[provider]
    async with asyncio.timeout(30):
        while providers.gone_wrong[provider] == before:  # noqa: ASYNC110 - the double has no event for it
            await asyncio.sleep(0.05)


# Each level holds what the next one holds; Pipecat writes less without its debug.
@pytest.mark.parametrize(("level", "debug"), [("DEBUG", "true"), ("WARNING", "false")])
async def test_no_canary_is_in_logs_metrics_or_the_termination_message(
    livekit: LiveKit, speech: Speech, tmp_path: Path, level: str, debug: str
) -> None:
    question = await speech("Could you please tell me something about yourself")
    variables = {
        "VOICEPOOL_LOG_LEVEL": level,
        "VOICEPOOL_DEBUG": debug,
        "SYSTEM_PROMPT": PROMPT,
        "OPENAI_LOG": "debug",
    }
    async with (
        Providers(key=KEY, hears=HEARD, answers=ANSWERED, babble=QUOTED) as providers,
        run_agent(BOTS / "reference" / "bot.py", tmp_path, {**providers.environment, **variables}) as agent,
    ):
        await agent.wait_until_ready()
        token = livekit.token("agent", "room", agent=True)
        order = agent.gateway.sign(
            agent.pod_uid, session="s-1", room="room", url=livekit.url, token=token, body={"name": NAME}
        )
        assert (await agent.post("/bind", order))[0] == 202
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            await caller.hear()
            await caller.say(*question)
            await caller.hear()
            # What follows goes wrong in every way in which a message is quoted.
            for provider, fault, babble in (
                ("inworld", Fault.ERRS, HEARD),
                ("groq", Fault.ERRS, QUOTED),
                ("assemblyai", Fault.BABBLES, QUOTED),
            ):
                asking = asyncio.create_task(caller.say(*question))
                await goes_wrong(providers, provider, fault, babble)
                await asking
            pages = await shown(agent)
        assert await agent.exit_code() == 0
        for prompt in (prompt for prompt in providers.prompts if prompt):
            assert any(PROMPT in str(message) for message in prompt)
        written = pages + agent.log + agent.termination_message
        assert [canary for canary in CANARIES if canary.lower() in written.lower()] == []
        assert [secret for secret in (token, order) if secret in written] == []
        assert TOKEN.findall(written) == []
        errors = "\n".join(agent.summary["errors"])
        assert "InworldTTSService: unknown: Inworld API error: [...]" in errors
        assert "Error code: 400 - Failed to call a function." in errors
        assert "non-JSON message: [...]" in agent.log
