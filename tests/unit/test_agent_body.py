"""The body before there is a caller: what counts as reading it, and that it is the one that is filled."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from voicepool_agent.body import EarlyBody


@pytest.fixture
def stacks() -> list[traceback.StackSummary]:
    return []


@pytest.fixture
def body(stacks: list[traceback.StackSummary]) -> EarlyBody:
    return EarlyBody(stacks.append)


@pytest.mark.parametrize(
    "read",
    [
        lambda body: body.get("name"),
        lambda body: "name" in body,
        lambda body: body.setdefault("name", "Ada"),
        lambda body: body.pop("name", None),
        lambda body: len(body),
        lambda body: list(body),
        lambda body: dict(body),
        lambda body: {**body},
        lambda body: dict(**body),
        lambda body: body | {},
        lambda body: body.copy(),
        lambda body: list(body.keys()),
        lambda body: list(body.values()),
        lambda body: list(body.items()),
        lambda body: body == {"name": "Ada"},
    ],
)
def test_reading_it_early_is_noticed(
    body: EarlyBody, stacks: list[traceback.StackSummary], read: Callable[[EarlyBody], Any]
) -> None:
    read(body)
    assert {Path(stack[-1].filename) for stack in stacks} == {Path(__file__)}


def test_a_key_that_has_to_be_there_is_noticed_and_missing(
    body: EarlyBody, stacks: list[traceback.StackSummary]
) -> None:
    with pytest.raises(KeyError):
        body["name"]
    line = traceback.extract_stack(limit=1)[0].lineno
    assert [(stack[-1].name, (line or 0) - (stack[-1].lineno or 0)) for stack in stacks] == [
        ("test_a_key_that_has_to_be_there_is_noticed_and_missing", 1)
    ]


@pytest.mark.parametrize("look", [repr, str, lambda body: body or {}, lambda body: isinstance(body, dict)])
def test_looking_at_it_as_a_whole_is_no_reading(
    body: EarlyBody, stacks: list[traceback.StackSummary], look: Callable[[EarlyBody], Any]
) -> None:
    look(body)
    assert not stacks


def test_a_bot_that_keeps_the_body_or_an_empty_one_has_what_arrives_later(
    body: EarlyBody, stacks: list[traceback.StackSummary]
) -> None:
    kept: dict[str, Any] = body or {}
    body.arrived()
    assert not body
    body.update({"name": "Ada"})
    assert kept == {"name": "Ada"}
    assert (kept["name"], len(kept), bool(kept), json.dumps(kept)) == ("Ada", 1, True, '{"name": "Ada"}')
    assert not stacks
