"""The bots of examples/, which know nothing of voicepool: parked, bound, spoken with in pods, through the gateway and LiveKit's server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import pytest
from tests.e2e.caller import Caller
from tests.e2e.conversation import call, story_of
from tests.e2e.deployment import Deployment, Json, own_address
from tests.e2e.pools import MakePool, light, until_over, until_state
from tests.e2e.providers import FunctionCall, Providers

from voicepool.model import AGENT_PORT

pytestmark = pytest.mark.cluster

SAID = "I would like to come on Monday"

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]
Call = Callable[..., contextlib.AbstractAsyncContextManager["Guest"]]


@dataclass(frozen=True, slots=True)
class Guest:
    """A caller in a room with an example bot.

    Attributes:
        pod: of the agent, as it was when the guest came.
        question: what the guest says.
    """

    deployment: Deployment
    pool: str
    session: str
    pod: Json
    caller: Caller
    providers: Providers
    question: tuple[bytes, int]

    async def speak(self) -> None:
        """Say something, and hear the end of an answer to it."""
        spoken = len(self.providers.spoken)
        await self.caller.say(*self.question)
        await self.caller.hear()
        assert len(self.providers.spoken) > spoken, "what was heard is no answer"

    async def route(self, method: str, path: str, body: object = None) -> tuple[int, Json]:
        """Ask the bot on a route of its own; status and JSON."""
        where = f"/v1/public/{self.pool}/sessions/{self.session}{path}"
        return await self.deployment.ask(where, method=method, body=body)

    async def log(self) -> str:
        """What the agent has written so far."""
        return await asyncio.to_thread(self.deployment.cluster.kubectl, "logs", self.pod["metadata"]["name"])


@pytest.fixture
def visit(deployment: Deployment, make_pool: MakePool, speech: Speech) -> Call:
    """Call an example bot, and hear its greeting if it has one; when the caller has left, the session must have ended well."""

    @contextlib.asynccontextmanager
    async def visit(
        bot: str, *, greets: bool = True, ends: str = "caller-left", **providers_do: object
    ) -> AsyncIterator[Guest]:
        question = await speech(SAID)
        async with Providers(host=own_address(deployment.cluster), **providers_do) as providers:  # type: ignore[arg-type]
            pool = await make_pool(bot.removesuffix(".py").replace("_", "-"), light(bot, **providers.environment))
            assert not any(providers.connections.values()), "a parked agent has opened connections"
            async with call(deployment, pool) as conversation:
                session = conversation.session.session_id
                pod = await asyncio.to_thread(deployment.pod_of_session, session)
                await until_state(deployment, pool, session, "joined")
                await conversation.caller.wait_until_listened_to()
                if greets:
                    assert (await conversation.listen()).seconds > 0.5
                yield Guest(deployment, pool, session, pod, conversation.caller, providers, question)

            ended = await until_over(deployment, pod["metadata"]["name"])
            record = await deployment.session(pool, session)
            told = f"{ended['status']}\n{record}\n{await story_of(deployment, session)}"
            assert ended["status"]["phase"] == "Succeeded", told
            assert record.summary is not None, told
            assert (record.summary["reason"], record.summary["errors"]) == (ends, []), told

    return visit


async def test_a_bot_that_can_be_called_over_several_transports_is_called_over_livekit(visit: Call) -> None:
    async with visit("several_transports.py", answers="Welcome to the hotel.") as guest:
        assert guest.providers.spoken[0].strip() == "Welcome to the hotel."
        await guest.speak()
        assert len(guest.providers.prompts) == 2


async def test_a_bot_without_parameters_for_livekit_calls_its_function(visit: Call) -> None:
    calls = [FunctionCall("free_rooms", {"weekday": "Monday"})]
    async with visit("function_calling.py", calls=calls, answers="Four rooms are free.") as guest:
        await guest.speak()
        assert guest.providers.offered[0] == {"free_rooms"}
        result = guest.providers.prompts[1][-1]
        assert (result["role"], '"free": 4' in result["content"]) == ("tool", True)
        assert [one.strip() for one in guest.providers.spoken][1] == "One moment, I am looking."
        assert 'the bot has no parameters for \\"livekit\\"; using those for \\"webrtc\\"' in await guest.log()


async def test_a_flow_goes_from_node_to_node(visit: Call) -> None:
    calls = [FunctionCall("note_arrival", {"weekday": "Monday"}), FunctionCall("note_nights", {"number": 2})]
    async with visit("flow.py", ends="bot-ended", calls=calls, answers="And what comes then, please?") as guest:
        assert guest.providers.offered == [{"note_arrival"}]
        await guest.speak()
        assert guest.providers.offered[-1] == {"note_nights"}
        assert guest.providers.prompts[-1][-1]["content"] == "Ask for how many nights they stay."
        await guest.speak()
        assert guest.providers.prompts[-1][-1]["content"] == "Thank the guest and say goodbye."
        # The last node ends the conversation by itself.
        async with asyncio.timeout(20):
            await guest.caller.agent_left.wait()


async def test_a_processor_of_the_bot_is_in_the_pipeline(visit: Call) -> None:
    heard = "my card is 4111 1111 1111 1111 and I come on Monday"
    async with visit("custom_processor.py", hears=heard) as guest:
        await guest.speak()
        assert guest.providers.prompts[0][-1]["content"] == "my card is (a number) and I come on Monday"


async def test_a_bot_with_pipecat_s_older_names_and_routes_on_its_runner_s_application(visit: Call) -> None:
    async with visit("older.py", greets=False) as guest:
        assert await guest.route("GET", "/hello") == (200, {"hello": guest.session})


async def test_a_bot_answers_on_its_own_routes(visit: Call) -> None:
    async with visit("own_routes.py") as guest:
        assert (await guest.route("GET", "/messages"))[0] == 200
        assert await guest.route("POST", "/say", {"text": "A taxi is waiting for you."}) == (200, {"queued": True})
        assert (await guest.caller.hear()).seconds > 0.5
        assert guest.providers.spoken[-1].strip() == "A taxi is waiting for you."
        await guest.route("POST", "/whisper", {"text": "The guest is a regular."})
        await guest.speak()
        assert {"role": "developer", "content": "The guest is a regular."} in guest.providers.prompts[-1]
        assert (await guest.route("POST", "/say", {"words": "no"}))[0] == 422
        # Past the gateway, nobody gets to a bot's routes.
        past = f"http://{guest.pod['status']['podIP']}:{AGENT_PORT}/sessions/{guest.session}/messages"
        async with aiohttp.ClientSession() as http, http.get(past) as answer:
            assert answer.status == 401
