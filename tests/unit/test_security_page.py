"""The documentation of who may do what says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from voicepool.gateway import errors

ROOT = Path(__file__).parents[2]


def test_every_test_that_a_threat_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    there: set[str] = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        there.update(re.findall(r"^\s*(?:async )?def (test_\w+)\(", file.read_text(), re.MULTILINE))
    assert len(named) > 40
    assert named - there == set()


def test_every_code_of_an_error_says_what_to_do() -> None:
    codes = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", (errors.__doc__ or "").partition("\nGatewayError\n")[2]))
    page = (ROOT / "docs" / "conditions-and-errors.md").read_text()
    told = set(re.findall(r"`([A-Z_]+)`", page.partition("## Errors of the session API")[2]))
    assert "RATE_LIMITED" in codes
    assert codes - told == set()
