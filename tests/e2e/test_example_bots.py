"""The bots of examples/, which know nothing of voicepool: parked, bound, spoken with over a real LiveKit server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.agent_process import AgentProcess, run_agent
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import FunctionCall, Providers

EXAMPLES = Path(__file__).parents[2] / "examples"
OLDER_BOT = """
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineTask
from pipecat.runner.run import app, main
from pipecat.runner.utils import create_transport
from pipecat.transports.base_transport import TransportParams

async def bot(runner_args):
    params = {"webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True)}
    transport = await create_transport(runner_args, params)
    task = PipelineTask(Pipeline([transport.input(), transport.output()]))

    @app.get("/hello")
    async def hello():
        return {"hello": runner_args.session_id}

    @transport.event_handler("on_client_disconnected")
    async def hang_up(transport, client):
        await task.cancel()

    await PipelineRunner(handle_sigint=False).run(task)

if __name__ == "__main__":
    main()
"""
"""As bots were written before Pipecat 1.3."""

SAID = "I would like to come on Monday"

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]
Call = Callable[..., contextlib.AbstractAsyncContextManager["Conversation"]]


@dataclass(slots=True)
class Conversation:
    """A caller in a room with an example bot, which has greeted."""

    agent: AgentProcess
    caller: Caller
    providers: Providers
    question: tuple[bytes, int]

    async def speak(self) -> None:
        """Say something, and hear the end of an answer to it."""
        spoken = len(self.providers.spoken)
        await self.caller.say(*self.question)
        await self.caller.hear()
        assert len(self.providers.spoken) > spoken, "what was heard is no answer"


@pytest.fixture
def call(livekit: LiveKit, speech: Speech, tmp_path: Path) -> Call:
    """Call an example bot; when the caller has left, the agent must have ended well."""

    @contextlib.asynccontextmanager
    async def call(bot: str, *, ends: str = "caller-left", **providers_do: object) -> AsyncIterator[Conversation]:
        question = await speech(SAID)
        async with (
            Providers(**providers_do) as providers,  # type: ignore[arg-type]
            run_agent(EXAMPLES / bot, tmp_path, providers.environment) as agent,
        ):
            await agent.wait_until_ready()
            assert not any(providers.connections.values()), "a parked agent has opened connections"
            token = livekit.token("agent", "room", agent=True)
            status, _ = await agent.bind(session="s-1", pool="demo", room="room", url=livekit.url, token=token)
            assert status == 202
            async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
                await caller.wait_until_listened_to()
                assert (await caller.hear()).seconds > 0.5
                yield Conversation(agent, caller, providers, question)
            assert await agent.exit_code() == 0
            assert (agent.summary["reason"], agent.summary["errors"]) == (ends, [])

    return call


async def test_a_bot_that_can_be_called_over_several_transports_is_called_over_livekit(call: Call) -> None:
    async with call("several_transports.py", answers="Welcome to the hotel.") as conversation:
        assert conversation.providers.spoken[0].strip() == "Welcome to the hotel."
        await conversation.speak()
        assert len(conversation.providers.prompts) == 2


async def test_a_bot_without_parameters_for_livekit_calls_its_function(call: Call) -> None:
    calls = [FunctionCall("free_rooms", {"weekday": "Monday"})]
    async with call("function_calling.py", calls=calls, answers="Four rooms are free.") as conversation:
        await conversation.speak()
        assert conversation.providers.offered[0] == {"free_rooms"}
        result = conversation.providers.prompts[1][-1]
        assert (result["role"], '"free": 4' in result["content"]) == ("tool", True)
        assert [one.strip() for one in conversation.providers.spoken][1] == "One moment, I am looking."
        assert 'the bot has no parameters for \\"livekit\\"; using those for \\"webrtc\\"' in conversation.agent.log


async def test_a_flow_goes_from_node_to_node(call: Call) -> None:
    calls = [FunctionCall("note_arrival", {"weekday": "Monday"}), FunctionCall("note_nights", {"number": 2})]
    async with call("flow.py", ends="bot-ended", calls=calls, answers="And what comes then, please?") as conversation:
        assert conversation.providers.offered == [{"note_arrival"}]
        await conversation.speak()
        assert conversation.providers.offered[-1] == {"note_nights"}
        assert conversation.providers.prompts[-1][-1]["content"] == "Ask for how many nights they stay."
        await conversation.speak()
        assert conversation.providers.prompts[-1][-1]["content"] == "Thank the guest and say goodbye."
        # The last node ends the conversation by itself.
        async with asyncio.timeout(20):
            await conversation.caller.agent_left.wait()


async def test_a_processor_of_the_bot_is_in_the_pipeline(call: Call) -> None:
    heard = "my card is 4111 1111 1111 1111 and I come on Monday"
    async with call("custom_processor.py", hears=heard) as conversation:
        await conversation.speak()
        assert conversation.providers.prompts[0][-1]["content"] == "my card is (a number) and I come on Monday"


async def test_a_bot_with_pipecat_s_older_names_and_routes_on_its_runner_s_application(
    livekit: LiveKit, tmp_path: Path
) -> None:
    (tmp_path / "bot.py").write_text(OLDER_BOT)
    async with run_agent("bot.py", tmp_path) as agent:
        await agent.wait_until_ready()
        token = livekit.token("agent", "room", agent=True)
        await agent.bind(session="s-1", room="room", url=livekit.url, token=token)
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            await caller.wait_until_listened_to()
            assert await agent.route("s-1", "GET", "/hello") == (200, {"hello": "s-1"})
        assert await agent.exit_code() == 0
        assert agent.summary["reason"] == "caller-left"


async def test_a_bot_answers_on_its_own_routes(call: Call) -> None:
    async with call("own_routes.py") as conversation:
        agent = conversation.agent
        assert (await agent.route("s-1", "GET", "/messages"))[0] == 200
        assert await agent.route("s-1", "POST", "/say", {"text": "A taxi is waiting for you."}) == (
            200,
            {"queued": True},
        )
        assert (await conversation.caller.hear()).seconds > 0.5
        assert conversation.providers.spoken[-1].strip() == "A taxi is waiting for you."
        await agent.route("s-1", "POST", "/whisper", {"text": "The guest is a regular."})
        await conversation.speak()
        assert {"role": "developer", "content": "The guest is a regular."} in conversation.providers.prompts[-1]
        assert (await agent.route("s-1", "POST", "/say", {"words": "no"}))[0] == 422
        assert (await agent.route("s-2", "GET", "/messages"))[0] == 404
        assert (await agent.get("/sessions/s-1/messages"))[0] == 401
