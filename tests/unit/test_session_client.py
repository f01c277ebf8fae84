"""The client of the session API, against a real gateway on a real socket."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import jwt
import pytest
from tests.ports import free_port
from tests.unit.authority import Authority
from tests.unit.between import Between, between, page, refusal
from tests.unit.fakes import NAMESPACE, POOLS, pool_object
from tests.unit.gateways import API_KEY, LIVEKIT_SECRET, SCOPED_KEY, Gateway, World, until, world
from tests.unit.loopback import served
from tests.unit.test_gateway_streams import end
from tests.without_async import RESULT, without_async

from voicepool import client
from voicepool.client import (
    AsyncVoicepool,
    ConnectionFailed,
    InvalidRequest,
    NotUnderstood,
    NoWarmAgent,
    PoolCounts,
    PoolNotAllowed,
    PoolNotFound,
    RateLimited,
    Session,
    SessionEnded,
    SessionNews,
    SessionNotFound,
    StreamBroken,
    Timeout,
    TlsFailed,
    TooManyStreams,
    TryAgainLater,
    Unauthorized,
    Voicepool,
)

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "python-client.md"


@dataclasses.dataclass
class Here:
    world: World
    gateway: Gateway
    address: str
    """Of the gateway itself."""
    way: Between

    def client(self, **more: Any) -> AsyncVoicepool:
        return AsyncVoicepool(self.way.address, **{"api_key": API_KEY, **more})

    def body_of(self, session: Session) -> Any:
        (agent,) = self.world.agents.with_session(session.session_id)
        return agent.claims[0]["body"]


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    async with world(tmp_path) as made:
        made.pool(onEmpty={"policy": "Queue", "timeoutSeconds": 30})
        gateway = await made.gateway(state_interval_seconds=0.02)
        async with served(gateway) as address, between(address) as way:
            yield Here(made, gateway, address, way)


# Starting a session


async def test_a_session_is_five_lines(here: Here) -> None:
    here.world.pods(1)
    async with AsyncVoicepool(here.way.address, api_key=API_KEY) as voicepool:
        session = await voicepool.start("demo", body={"name": "Ada"})
    assert session.url == "ws://livekit.example:7880"
    assert jwt.decode(session.token, LIVEKIT_SECRET, algorithms=["HS256"])["video"]["room"] == session.room_name
    assert (session.state, session.cold_start, session.pool) == ("accepted", False, f"{NAMESPACE}.demo")
    assert session.bot_start_seconds >= 0
    assert here.body_of(session) == {"name": "Ada"}


async def test_tokens_and_keys_are_in_no_repr(here: Here) -> None:
    here.world.pods(2)
    async with here.client() as voicepool:
        session = await voicepool.start("demo")
        token = await voicepool.livekit_token("demo")
        shown = f"{voicepool!r} {session!r} {session} {token!r}"
    assert session.session_id in shown
    assert not any(secret in shown for secret in (API_KEY, session.token, token.participant_token))


async def test_one_of_several_pools_by_name_or_by_label(here: Here) -> None:
    here.world.pods(4)
    labelled = pool_object("demo")
    labelled["metadata"]["labels"] = {"language": "fr"}
    here.world.kube.put(POOLS, labelled)
    await until(lambda: here.gateway.services.view.pools[NAMESPACE, "demo"].labels)
    async with here.client() as voicepool:
        wishes: list[dict[str, Any]] = [
            {"pools": ["empty", "demo"]},
            {"selector": {"language": "fr"}},
            {"selector": "language in (fr, de)", "namespace": NAMESPACE},
        ]
        assert (await voicepool.start()).agent.pool == "demo"
        here.world.kube.put(POOLS, pool_object("empty"))
        await until(lambda: (NAMESPACE, "empty") in here.gateway.services.view.pools)
        for wish in wishes:
            session = await voicepool.start(**wish)
            assert session.agent.pool == "demo"
        for wish in ({"selector": {"language": "it"}}, {"pools": ["demo", "gone"]}):
            with pytest.raises(PoolNotFound):
                await voicepool.start(**wish)
        with pytest.raises(InvalidRequest, match="two of them"):
            await voicepool.start("demo", pools=["demo"])


async def test_a_session_id_or_a_key_of_ones_own_gets_the_same_agent_again(here: Here) -> None:
    here.world.pods(3)
    async with here.client() as voicepool:
        first, second = [await voicepool.start("demo", session_id="call-7") for _ in range(2)]
        assert (first.session_id, first.agent) == ("call-7", second.agent)
        third, fourth = [await voicepool.start("demo", idempotency_key="order 7") for _ in range(2)]
        assert (third.session_id, third.agent) == (fourth.session_id, fourth.agent)
        assert third.agent != first.agent
        end(here.world, first.agent.pod)
        with pytest.raises(SessionEnded):
            await voicepool.start("demo", session_id="call-7")


async def test_a_start_may_wait_until_the_agent_is_in_the_room(here: Here) -> None:
    here.world.pods(1)
    async with here.client() as voicepool:
        assert (await voicepool.start("demo", wait_for="joined")).state == "joined"


async def test_the_trace_of_the_caller_goes_along(here: Here) -> None:
    here.world.pods(1)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with here.client() as voicepool:
        await voicepool.start("demo", traceparent=trace)
    assert here.way.sent("traceparent") == [trace]


async def test_a_caller_with_a_name_gets_its_token_in_livekits_words(here: Here) -> None:
    here.world.pods(1)
    async with here.client() as voicepool:
        tokens = [
            await voicepool.livekit_token(
                "demo",
                body={"language": "de"},
                room_name="visit 7",
                participant_identity="ada",
                participant_name="Ada",
                participant_metadata="vip",
                participant_attributes={"plan": "gold"},
            )
            for _ in range(2)
        ]
    first, second = [jwt.decode(one.participant_token, LIVEKIT_SECRET, algorithms=["HS256"]) for one in tokens]
    assert (first["sub"], first["name"], first["metadata"], first["attributes"]) == (
        "ada",
        "Ada",
        "vip",
        {"plan": "gold"},
    )
    assert first["video"]["room"] == second["video"]["room"]
    (agent,) = (one for one in here.world.agents.all() if one.claims)
    assert agent.claims[0]["body"] == {"language": "de"}
    assert tokens[0].server_url == "ws://livekit.example:7880"


# Again, and no more than once


async def test_a_start_whose_answer_is_lost_is_sent_again_and_gets_the_same_agent(here: Here) -> None:
    here.world.pods(2)
    here.way.lose = 1
    async with here.client() as voicepool:
        session = await voicepool.start("demo")
        token = await voicepool.livekit_token("demo")
    first, second, other = here.way.sent("Idempotency-Key")
    assert first == second != other
    assert token.server_url
    carriers = [pod["metadata"]["labels"]["voicepool.dev/session"] for pod in here.world.kube.bound()]
    assert carriers.count(session.session_id) == 1
    assert len(carriers) == 2


async def test_a_gateway_that_has_just_started_is_asked_again_when_it_says(here: Here) -> None:
    here.world.pods(1)
    services = dataclasses.replace(here.gateway.services, synced=lambda: len(way.requests) > 1)
    async with (
        served(Gateway(services, here.gateway.client)) as address,
        between(address) as way,
        AsyncVoicepool(way.address, api_key=API_KEY) as voicepool,
    ):
        session = await voicepool.start("demo")
    assert here.world.agents.with_session(session.session_id)
    first, second = way.sent("Idempotency-Key")
    assert first is not None
    assert first == second


async def test_what_comes_from_a_proxy_while_gateways_are_replaced_is_passed_over(here: Here) -> None:
    here.world.pods(1)
    here.way.answers = [page(502, "<h1>Bad gateway</h1>"), b"", refusal(503, "SOMETHING_NEW", retry_after_seconds=0)]
    async with here.client() as voicepool:
        assert (await voicepool.start("demo")).session_id
    assert len(set(here.way.sent("Idempotency-Key"))) == 1
    assert len(here.way.requests) == 4


@pytest.mark.parametrize(
    "answer",
    [
        refusal(400, "INVALID_REQUEST"),
        refusal(401, "UNAUTHENTICATED"),
        refusal(500, "INTERNAL"),
        refusal(503, "LIVEKIT_NOT_CONFIGURED"),
        refusal(504, "AGENT_NOT_JOINED", retry_after_seconds=2),
        page(404, "<h1>Not found</h1>"),
    ],
)
async def test_what_does_not_pass_is_told_at_once(here: Here, answer: bytes) -> None:
    here.way.answers = [answer]
    async with here.client() as voicepool:
        with pytest.raises(Exception, match="What to do"):
            await voicepool.start("demo")
    assert len(here.way.requests) == 1


async def test_who_is_told_to_come_back_after_the_deadline_hears_that_and_does_not_wait(here: Here) -> None:
    here.world.pool(replicas=0, onEmpty={"policy": "Reject"})
    await until(lambda: here.gateway.services.view.pools[NAMESPACE, "demo"].spec.on_empty.policy == "Reject")
    async with here.client(timeout_seconds=50) as voicepool:
        with pytest.raises(NoWarmAgent) as caught:
            await voicepool.start("demo")
    assert (caught.value.status, caught.value.code, caught.value.retry_after_seconds) == (429, "NO_WARM_AGENT", 60)
    assert len(here.way.requests) == 1
    assert "calls/demo" in str(caught.value)


async def test_without_retries_a_refusal_is_told_as_it_comes_and_a_start_has_no_key(here: Here) -> None:
    here.way.answers = [refusal(429, "RATE_LIMITED", retry_after_seconds=0)]
    async with here.client(retry=False) as voicepool:
        with pytest.raises(RateLimited):
            await voicepool.start("demo")
    assert here.way.sent("Idempotency-Key") == [None]


@pytest.mark.parametrize("how", ["time", "cancel"])
async def test_a_caller_who_gives_up_leaves_the_queue(here: Here, how: str) -> None:
    async with here.client(timeout_seconds=0.5 if how == "time" else 20) as voicepool:
        start = asyncio.create_task(voicepool.start("demo"))
        await until(here.gateway.waiting)
        if how == "cancel":
            start.cancel()
        with pytest.raises(Timeout if how == "time" else asyncio.CancelledError):
            await start
        await until(lambda: not here.gateway.waiting())
    assert len(here.way.requests) == 1


async def test_a_call_whose_time_is_up_says_what_it_was_told_before(here: Here) -> None:
    here.way.answers = [refusal(503, "CLUSTER_UNAVAILABLE", retry_after_seconds=0)]
    async with here.client() as voicepool:
        with pytest.raises(Timeout, match="2 attempts") as caught:
            await voicepool.start("demo", timeout_seconds=0.5)
    assert isinstance(caught.value.__cause__, TryAgainLater)


# What is asked of sessions


async def test_sessions_are_shown_listed_and_ended(here: Here) -> None:
    here.world.pods(3)
    async with here.client() as voicepool:
        started = [await voicepool.start("demo") for _ in range(3)]
        one = await voicepool.session(started[0].pool, started[0].session_id)
        assert (one.session_id, one.room_name, one.agent.pod) == (
            started[0].session_id,
            started[0].room_name,
            started[0].agent.pod,
        )
        assert one.created_at is not None
        assert abs(datetime.now(UTC) - one.created_at) < timedelta(minutes=1)
        listed = [record async for record in voicepool.sessions("demo", page_size=2)]
        assert [record.session_id for record in listed] == [session.session_id for session in started[::-1]]
        assert len([request for request in here.way.requests if "cursor=" in request]) == 1
        assert (await voicepool.end("demo", started[0].session_id)).status == "terminated"
        assert (await voicepool.end("demo", started[1].session_id, mode="drain")).status == "draining"
        with pytest.raises(SessionNotFound):
            await voicepool.session("demo", "nobody")
    ends = [here.world.agents.with_session(session.session_id)[0].ends for session in started]
    assert ends == [["cancel"], ["drain"], []]


async def test_a_list_shows_what_the_filters_let_through(here: Here) -> None:
    here.world.pods(2)
    begun = datetime.now(UTC) - timedelta(minutes=1)
    async with here.client() as voicepool:
        over, running = [(await voicepool.start("demo")) for _ in range(2)]
        end(here.world, over.agent.pod)
        await until(lambda: any(pod.finished for pod in here.gateway.services.view.pods((NAMESPACE, "demo"))))

        async def found(**wanted: Any) -> set[str]:
            return {record.session_id async for record in voicepool.sessions("demo", **wanted)}

        assert await found(state="active") == {running.session_id}
        assert await found(state="ended", end_state="completed") == {over.session_id}
        assert await found(created_after=begun) == {over.session_id, running.session_id}
        assert await found(created_before=begun) == set()
        assert await found(deployment_id="bbbbbbbb") == set()
        (record,) = [one async for one in voicepool.sessions("demo", state="ended")]
        assert (record.reason, record.completion_status, record.summary) == (
            "caller-left",
            "completed",
            {"session": "s", "reason": "caller-left"},
        )


async def test_a_log_is_read_and_followed_over_a_broken_connection_without_a_gap(here: Here) -> None:
    here.world.pods(1)
    async with here.client() as voicepool:
        session = await voicepool.start("demo")
        log = here.world.kube.logs[session.agent.pod]
        for second in range(3):
            log.write(f"line {second}", second)
        assert [line.log for line in await voicepool.log("demo", session.session_id, tail=2)] == ["line 1", "line 2"]
        here.way.cut_after = b"line 2"
        followed = voicepool.follow_log("demo", session.session_id, tail=2)
        lines = [await anext(followed), await anext(followed)]
        log.write("line 3", 3)
        lines.append(await anext(followed))
        log.end()
        lines += [line async for line in followed]
    assert [line.log for line in lines] == ["line 1", "line 2", "line 3"]
    assert lines[2].timestamp == "2026-03-01T12:00:03.000000000Z"
    assert here.way.sent("Last-Event-ID")[-1] == lines[1].timestamp


async def test_who_leaves_a_log_leaves_nobody_reading_it(here: Here) -> None:
    here.world.pods(1)
    async with here.client() as voicepool:
        session = await voicepool.start("demo")
        log = here.world.kube.logs[session.agent.pod]
        log.write("hello")
        async with contextlib.aclosing(voicepool.follow_log("demo", session.session_id)) as lines:
            async for line in lines:
                assert line.log == "hello"
                break
        await until(lambda: not log.readers)


async def test_the_states_of_a_session_are_told_once_each_over_a_broken_connection(here: Here) -> None:
    here.world.pods(1)
    async with here.client() as voicepool:
        session = await voicepool.start("demo")
        here.way.cut_after = b'"state":"joined"'
        states = []
        async for record in voicepool.watch("demo", session.session_id):
            states.append(record.state)
            if record.state == "joined":
                end(here.world, session.agent.pod)
        with pytest.raises(SessionNotFound):
            await anext(voicepool.watch("demo", "nobody"))
    assert states == ["accepted", "joined", "ended"]


async def test_a_pool_tells_its_counts_and_sessions_and_a_gap_is_not_hidden(here: Here) -> None:
    here.world.pods(1)
    await until(lambda: len(list(here.gateway.services.view.pods((NAMESPACE, "demo")))) == 1)
    async with here.client() as voicepool:
        here.way.cut_after = b"session.ended"
        news = voicepool.watch_pool("demo")
        counts = await anext(news)
        assert isinstance(counts, PoolCounts)
        assert (counts.warm, counts.bound) == (1, 0)
        session = await voicepool.start("demo")
        end(here.world, session.agent.pod)
        seen: list[PoolCounts | SessionNews] = []
        with pytest.raises(StreamBroken, match="list of sessions"):
            await collect(news, seen)
    told = [(one.what, one.record.session_id) for one in seen if isinstance(one, SessionNews)]
    assert told == [("started", session.session_id), ("ended", session.session_id)]


async def collect(news: AsyncIterator[T], seen: list[T]) -> None:
    while True:
        seen.append(await anext(news))


async def test_a_gateway_with_no_place_for_a_stream_says_so(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        made.pool()
        made.pods(1)
        gateway = await made.gateway(max_streams=0)
        async with served(gateway) as address, AsyncVoicepool(address, api_key=API_KEY, timeout_seconds=3) as voicepool:
            with pytest.raises(TooManyStreams) as caught:
                await anext(voicepool.watch_pool("demo"))
    assert caught.value.retry_after_seconds == 5


# Without an event loop


async def test_a_thread_does_all_this_without_async(here: Here) -> None:
    here.world.pods(2)
    here.way.lose = 1

    def calls() -> None:
        with Voicepool(here.way.address, api_key=API_KEY) as voicepool:
            session = voicepool.start("demo", body=[1, 2], wait_for="joined")
            assert here.body_of(session) == [1, 2]
            other = voicepool.start("demo")
            listed = [record.session_id for record in voicepool.sessions("demo", page_size=1)]
            assert listed == [other.session_id, session.session_id]
            states = []
            for record in voicepool.watch("demo", session.session_id):
                states.append(record.state)
                if record.state == "joined":
                    voicepool.end("demo", session.session_id, mode="drain")
                    here.world.agents.with_session(session.session_id)[0].state = "ending"
                if record.state == "ending":
                    break
            assert states == ["accepted", "joined", "ending"]
            with pytest.raises(SessionNotFound):
                voicepool.log("demo", "nobody")

    await asyncio.to_thread(calls)
    assert len(here.world.kube.bound()) == 2


async def test_a_thread_is_told_when_its_time_is_up(here: Here) -> None:
    def call() -> None:
        with Voicepool(here.way.address, api_key=API_KEY) as voicepool, pytest.raises(Timeout):
            voicepool.start("demo", timeout_seconds=0.5)

    await asyncio.to_thread(call)
    await until(lambda: not here.gateway.waiting())


def test_the_client_without_async_is_made_from_the_one_with_it() -> None:
    assert RESULT.read_text() == without_async(), "run `make client`"


# What goes wrong, in words


async def test_a_wrong_key_says_what_to_do(here: Here) -> None:
    async with here.client(api_key="wrong") as voicepool:
        with pytest.raises(Unauthorized, match=r"not known here\. \(401 UNAUTHENTICATED\) What to do: give an api_key"):
            await voicepool.start("demo")
    async with here.client(api_key=None) as voicepool:
        with pytest.raises(Unauthorized):
            await voicepool.session("demo", "one")
    async with here.client(api_key=SCOPED_KEY) as voicepool:
        with pytest.raises(PoolNotAllowed):
            await voicepool.start("demo")


async def test_a_key_may_come_from_a_file_and_change(here: Here) -> None:
    here.world.pods(1)
    keys = iter(["an old one", f"{API_KEY}\n"])
    async with here.client(api_key=lambda: next(keys)) as voicepool:
        with pytest.raises(Unauthorized):
            await voicepool.start("demo")
        assert (await voicepool.start("demo")).session_id


async def test_a_gateway_that_is_away_is_named_with_what_to_do() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    async with AsyncVoicepool(address, api_key="x", timeout_seconds=0.6) as voicepool:
        with pytest.raises(ConnectionFailed, match="What to do: check the address") as caught:
            await voicepool.start("demo")
    assert f"POST {address}/start" in str(caught.value)
    with Voicepool(address, api_key="x", timeout_seconds=0.6) as other, pytest.raises(ConnectionFailed):
        other.session("demo", "one")


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_gateway_whose_certificate_is_not_trusted_is_told_apart_at_once(
    here: Here, trusted: bool, tmp_path: Path
) -> None:
    here.world.pods(1)
    authority = Authority(tmp_path)
    server = await asyncio.start_server(here.way.accept, "127.0.0.1", 0, ssl=authority.server)
    verify = authority.client if trusted else ssl.create_default_context()
    async with server, httpx2.AsyncClient(verify=verify) as http:
        address = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AsyncVoicepool(address, api_key=API_KEY, http_client=http) as voicepool:
            if trusted:
                assert (await voicepool.start("demo")).session_id
                return
            with pytest.raises(TlsFailed, match="What to do: check https or http"):
                await voicepool.start("demo")
    assert here.way.requests == []


async def test_https_where_nobody_speaks_it_is_told_at_once(here: Here) -> None:
    async with AsyncVoicepool(here.address.replace("http:", "https:"), api_key="x") as voicepool:
        with pytest.raises(TlsFailed):
            await voicepool.start("demo")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (page(200, "<h1>Hello</h1>"), "text/html"),
        (page(302, "<h1>Elsewhere</h1>"), "302"),
        (page(200, '{"sessionId": "one"}', "application/json"), "url, token, roomName"),
        (page(404, '{"message": "no route"}', "application/json"), "none of the session API"),
    ],
)
async def test_another_server_at_that_address_is_not_taken_for_a_gateway(here: Here, answer: bytes, words: str) -> None:
    here.way.answers = [answer]
    async with here.client() as voicepool:
        with pytest.raises(NotUnderstood, match=words):
            await voicepool.start("demo")


async def test_an_answer_that_cannot_be_read_does_not_show_its_values(here: Here) -> None:
    here.way.answers = [page(200, json.dumps({"token": ["hush"]}), "application/json")]
    async with here.client() as voicepool:
        with pytest.raises(NotUnderstood) as caught:
            await voicepool.start("demo")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "answer", [page(200, "<h1>Hello</h1>"), page(200, "event: session\ndata: 1\n\n", "text/event-stream")]
)
async def test_what_is_no_stream_of_the_session_api_is_not_followed(here: Here, answer: bytes) -> None:
    here.way.answers = [answer]
    async with here.client() as voicepool:
        with pytest.raises(NotUnderstood):
            await anext(voicepool.watch("demo", "one"))


@pytest.mark.parametrize(
    "url",
    [
        "voice.example.com",
        "ftp://voice.example.com",
        "https://",
        "http://h:port",
        "https://h/?pool=x",
        "https://ada:hush@h",
        "",
    ],
)
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="like https://"):
        AsyncVoicepool(url, api_key="x")


async def test_arguments_that_make_no_sense_are_refused_before_anything_is_sent(here: Here) -> None:
    with pytest.raises(ValueError, match="api_key is empty"):
        here.client(api_key=" ")
    async with here.client() as voicepool:
        for bad in (
            voicepool.start(""),
            voicepool.start("demo", session_id="no/such"),
            voicepool.start(pools=[]),
            voicepool.session("demo", ".."),
            anext(voicepool.sessions("demo", created_after=datetime(2026, 3, 1))),  # its time zone is missing
        ):
            with pytest.raises(ValueError):  # noqa: PT011 -- each has its own words
                await bad
    assert here.way.requests == []


async def test_names_reach_the_gateway_as_they_are(here: Here) -> None:
    async with here.client() as voicepool:
        with pytest.raises(SessionNotFound):
            await voicepool.session("demo", "a b?c#d")
    assert "/v1/agents/demo/sessions/a%20b%3Fc%23d HTTP" in here.way.requests[0]


# How it is used


async def test_an_http_client_of_ones_own_is_used_and_stays_open(here: Here) -> None:
    here.world.pods(1)
    async with httpx2.AsyncClient(headers={"X-Mine": "yes"}) as http:
        async with here.client(http_client=http) as voicepool:
            await voicepool.start("demo")
        assert not http.is_closed
    assert here.way.sent("X-Mine") == ["yes"]


async def test_an_address_may_have_a_path(here: Here) -> None:
    here.way.answers = [refusal(401, "UNAUTHENTICATED")]
    async with AsyncVoicepool(f"{here.way.address}/voice/", api_key="x") as voicepool:
        with pytest.raises(Unauthorized):
            await voicepool.start("demo")
    assert here.way.requests[0].startswith("POST /voice/start ")


async def test_nothing_that_is_secret_is_logged(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    here.world.pods(1)
    async with here.client() as voicepool:
        session = await voicepool.start("demo", body={"name": "hush"})
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("http"))
    assert ours
    assert not [secret for secret in (API_KEY, session.token, "hush") if secret in ours]


def test_importing_the_client_brings_nothing_of_the_operator_along() -> None:
    seen = subprocess.run(
        [sys.executable, "-c", "import voicepool.client, sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "voicepool.client" in seen
    roots = {name.partition(".")[0] for name in seen}
    assert not roots & {"aiohttp", "fastapi", "starlette", "jwt", "kopf", "kubernetes", "livekit", "prometheus_client"}
    ours = {name for name in seen if name.startswith("voicepool.") and not name.startswith("voicepool.client")}
    assert ours == {"voicepool.session_api"}


# What is shown to users


async def test_the_example_starts_a_session(here: Here) -> None:
    here.world.pods(1)
    example = ROOT / "examples" / "start_a_session.py"
    assert len([line for line in example.read_text().splitlines()[1:] if line]) <= 6
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, example, "demo"),
        env={**os.environ, "GATEWAY": here.way.address, "KEY": API_KEY},
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    session, url, token = said.decode().split()
    assert here.world.agents.with_session(session)[0].claims[0]["body"] == {"name": "Ada"}
    assert (url, token.count(".")) == ("ws://livekit.example:7880", 2)


async def test_the_guide_does_what_it_shows(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    here.world.pods(2)
    first, calls, errors, certificates = re.findall(
        r"^```python\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE
    )
    names: dict[str, Any] = {**vars(client), "contextlib": contextlib, "key": API_KEY}

    async def do(text: str) -> None:
        text = text.replace("https://voice.example.com", here.way.address).replace("support-line", "demo")
        await eval(compile(text, GUIDE, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)  # noqa: S307 -- our own page

    await do(first)
    assert capsys.readouterr().out.startswith("ws://livekit.example:7880 ey")
    async with here.client() as voicepool:
        names["voicepool"] = voicepool
        task = asyncio.create_task(do(calls))
        await until(lambda: any(agent.ends for agent in here.world.agents.all()))
        (ending,) = (agent for agent in here.world.agents.all() if agent.ends)
        assert ending.ends == ["drain"]
        end(here.world, names["session"].agent.pod)
        await task
        assert len(names["active"]) == 1
        assert names["active"][0].session_id != names["session"].session_id
        here.way.answers = [refusal(503, "NO_WARM_AGENT", retry_after_seconds=99), refusal(401, "UNAUTHENTICATED")]
        await do(errors)
        await do(errors)
    said = capsys.readouterr().out
    assert "try again in 99 s" in said
    assert "In words. (401 UNAUTHENTICATED) What to do" in said
    assert "httpx2.AsyncClient(verify=context)" in certificates
