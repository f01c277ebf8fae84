"""When an agent is worth being killed by the kubelet: only when it hangs at its end."""

from __future__ import annotations

import pytest

from voicepool_agent.bot_routes import BotRoutes
from voicepool_agent.host import Host, State
from voicepool_agent.logs import Logs, Redactor
from voicepool_agent.metrics import Metrics
from voicepool_agent.settings import read_settings
from voicepool_agent.tracing import Tracing

SETTINGS = read_settings(
    {
        "VOICEPOOL_POD_UID": "uid-1",
        "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----",
        "VOICEPOOL_SESSION_DRAIN_TIMEOUT_SECONDS": "20",
    }
)


@pytest.mark.parametrize("state", list(State))
async def test_only_an_agent_that_does_not_come_to_its_end_is_not_live(state: State) -> None:
    now, redact = 100.0, Redactor()
    metrics = Metrics([one.value for one in State])
    host = Host(SETTINGS, metrics, Logs(SETTINGS, redact), redact, BotRoutes(), Tracing(), clock=lambda: now)
    host._enter(state)
    now += 45
    assert host.is_live
    now += 10
    assert host.is_live is (state is not State.ENDING)
