"""The agent's environment."""

from __future__ import annotations

import pytest

from voicepool_agent.settings import SettingsError, read_settings

COMPLETE = {
    "VOICEPOOL_POD_UID": "uid-1",
    "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----\n",
}


def test_what_the_operator_injects_is_enough() -> None:
    settings = read_settings({**COMPLETE, "PATH": "/bin"})
    assert settings.port == 8080
    assert settings.max_duration_seconds == 7200
    assert settings.warmth == "Built"
    assert str(settings.termination_message_path) == "/dev/termination-log"


def test_an_empty_variable_counts_as_not_set() -> None:
    assert read_settings({**COMPLETE, "BOT": "", "PORT": ""}).bot == "bot.py"


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as raised:
        read_settings({})
    assert "VOICEPOOL_POD_UID" in str(raised.value)
    assert "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VOICEPOOL_SESSION_MAX_DURATION_SECONDS", "0"),
        ("VOICEPOOL_SESSION_IDLE_TIMEOUT_SECONDS", "soon"),
        ("PORT", "70000"),
        ("VOICEPOOL_LOG_FORMAT", "xml"),
        ("VOICEPOOL_WARMTH", "Hot"),
        ("VOICEPOOL_ASSIGNMENT_PUBLIC_KEY", "abc"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_settings({**COMPLETE, name: value})


def test_a_refusal_does_not_show_the_value() -> None:
    with pytest.raises(SettingsError) as raised:
        read_settings({**COMPLETE, "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "canary"})
    assert "canary" not in str(raised.value)
