"""What the keyless bot says to what its recogniser writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

BOT_FOLDER = Path(__file__).parents[2] / "agent-image" / "bots" / "keyless"


@pytest.fixture(scope="module")
def answer() -> Callable[[str], str]:
    spec = importlib.util.spec_from_file_location("keyless_answers", BOT_FOLDER / "answers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str], str] = module.answer
    return found


@pytest.mark.parametrize(
    "heard",
    [
        "What are your opening hours?",
        "when do you open",
        "Opening ours, please. What are the hours?",
        "Are you open on Friday?",
    ],
)
def test_opening_hours_are_told_however_they_are_asked_for(answer: Callable[[str], str], heard: str) -> None:
    assert answer(heard) == "We are open from nine in the morning to five in the afternoon, Monday to Friday."


@pytest.mark.parametrize(
    ("heard", "words"),
    [
        ("What is your name?", "My name is Joe"),
        ("Who are you?", "My name is Joe"),
        ("What can you do?", "I can tell you"),
        ("Will it rain tomorrow?", "I know nothing about the weather"),
        ("Where can I find you?", "Garden Street"),
        ("How are you today?", "I am very well"),
        ("Thank you very much.", "You are welcome"),
        ("Goodbye!", "Goodbye"),
        ("Good morning.", "How can I help you"),
        ("", "did not understand"),
        ("...", "did not understand"),
    ],
)
def test_each_rule_has_its_answer(answer: Callable[[str], str], heard: str, words: str) -> None:
    assert words in answer(heard)


def test_anything_else_is_turned_round(answer: Callable[[str], str]) -> None:
    assert answer("I like your voice.") == "You said: you like my voice. Tell me more."


def test_a_long_speech_is_echoed_in_part(answer: Callable[[str], str]) -> None:
    assert len(answer("word " * 100).split()) < 20
