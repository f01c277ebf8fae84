"""A call with a collector of traces: one trace from the caller's to the session's end, and nothing in it that was said."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.e2e.agent_process import BOTS, run_agent
from tests.e2e.bound import ROOM, SESSION, bound_agent, reason_of
from tests.e2e.caller import Caller
from tests.e2e.collector import Collector
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import Providers
from tests.e2e.test_stuck import BLOCKING_BOT
from tests.ports import free_port

from voicepool.gateway.tracing import make_tracing

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEARD = "my secret word is kookaburra"
ANSWERED = "I shall never write down kingfisher"
NAME, KEY, PROMPT = "Rosella", "canary-key-of-a-provider", "You never mention the word lyrebird."
CANARIES = ("kookaburra", "kingfisher", NAME, KEY, "lyrebird", "eyJ")


async def test_a_call_is_one_trace_from_the_callers_to_the_sessions_end(
    livekit: LiveKit, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = await speech("Could you please tell me something about yourself")
    source = (BOTS / "reference" / "bot.py").read_text()
    traced = source.replace(
        "        pipeline,\n        params=", "        pipeline,\n        enable_tracing=True,\n        params="
    )
    assert traced != source
    (tmp_path / "bot.py").write_text(traced)
    async with Collector() as collector, Providers(key=KEY, hears=HEARD, answers=ANSWERED) as providers:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        gateway = make_tracing(collector.environment, instance="gateway-1")
        variables = {**providers.environment, **collector.environment, "SYSTEM_PROMPT": PROMPT}
        async with run_agent("bot.py", tmp_path, variables) as agent:
            await agent.wait_until_ready()
            token = livekit.token("agent", ROOM, agent=True)
            with (
                gateway.request("/start", f"00-{TRACE}-{CALLER}-01") as request,
                request.child("delivery") as delivery,
            ):
                claims = {"session": SESSION, "room": ROOM, "url": livekit.url, "token": token, "pool": "default/demo"}
                await agent.bind(**claims, body={"name": NAME}, traceparent=delivery.traceparent)
            async with Caller(livekit.url, livekit.token("caller", ROOM)) as caller:
                await caller.hear()
                await caller.say(*question)
                await caller.hear()
            assert await agent.exit_code() == 0
            summary = agent.summary
        await gateway.close()
    assert {span.trace for span in collector.spans} == {TRACE}
    names = {span.identity: span.name for span in collector.spans}
    assert len(names) == len(collector.spans), "each span came once"
    parents = {(names.get(span.parent, span.parent), span.name) for span in collector.spans}
    assert parents >= {
        (CALLER, "POST /start"),
        ("POST /start", "delivery"),
        ("delivery", "session"),
        ("session", "joining"),
        ("session", "first audio"),
        ("session", "turn"),
        ("turn", "llm_inference"),
        ("turn", "speech_synthesis"),
    }
    assert {span.service for span in collector.named("session")} == {"voicepool-agent"}
    assert {span.service for span in collector.named("delivery")} == {"voicepool-gateway"}
    (session,) = collector.named("session")
    assert not session.failed
    assert session.attributes["voicepool.pool"] == "default/demo"
    assert session.attributes["voicepool.session"] == SESSION
    assert session.attributes["voicepool.reason"] == summary["reason"]
    assert session.attributes["voicepool.turns"] == summary["turns"] >= 1
    assert session.attributes["voicepool.joined_seconds"] == pytest.approx(summary["joinedSeconds"], abs=0.001)
    assert session.seconds == pytest.approx(summary["durationSeconds"], abs=0.1)
    (first,) = collector.named("first audio")
    assert first.seconds == pytest.approx(summary["firstAudioSeconds"], abs=0.001)
    received = b"".join(collector.received).decode(errors="replace").lower()
    assert [canary for canary in CANARIES if canary.lower() in received] == []


async def test_a_collector_that_is_away_changes_nothing_but_one_line_of_the_log(
    livekit: LiveKit, tmp_path: Path
) -> None:
    nobody = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    bot = Path(__file__).parent / "bots" / "light.py"
    async with bound_agent(livekit, tmp_path, bot, {**nobody, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}) as agent:
        async with Caller(livekit.url, livekit.token("caller", ROOM)) as caller:
            await caller.hear()
        assert await agent.exit_code() == 0
        assert agent.summary["errors"] == []
        assert agent.summary["joinedSeconds"] is not None
        assert agent.log.count("the collector of traces does not take spans") == 1


async def test_an_agent_that_hangs_still_sends_the_end_of_its_session(livekit: LiveKit, tmp_path: Path) -> None:
    async with Collector() as collector:
        variables = {**collector.environment, "VOICEPOOL_BLOCKED_TIMEOUT_SECONDS": "3"}
        async with (
            bound_agent(livekit, tmp_path, BLOCKING_BOT, variables) as agent,
            Caller(livekit.url, livekit.token("caller", ROOM)),
        ):
            assert await reason_of(agent) == "stuck"
        (session,) = collector.named("session")
    assert session.failed
    assert session.attributes["error.type"] == "stuck"


async def test_an_agent_without_a_collector_imports_nothing_of_the_sdk(livekit: LiveKit, tmp_path: Path) -> None:
    bot = Path(__file__).parent / "bots" / "light.py"
    async with bound_agent(livekit, tmp_path, bot, {"PYTHONVERBOSE": "1"}) as agent:
        async with Caller(livekit.url, livekit.token("caller", ROOM)) as caller:
            await caller.hear()
        assert await agent.exit_code() == 0
        assert "import 'voicepool_agent.tracing'" in agent.log
        assert "import 'opentelemetry.sdk." not in agent.log
        assert "import 'opentelemetry.exporter." not in agent.log
