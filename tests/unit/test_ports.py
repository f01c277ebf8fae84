"""Ports that tests take for their servers."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from tests import ports


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many ports there are at most."""
    count = 8
    monkeypatch.setattr(ports, "_first_of_the_systems_own", lambda: ports._LOWEST + count)
    return count


def all_that_are_left() -> list[int]:
    """Everything that can still be had."""
    given: list[int] = []
    with contextlib.suppress(RuntimeError):
        while True:
            given.append(ports.free_port())
    return given


def test_a_port_is_given_once(few: int) -> None:
    given = all_that_are_left()
    assert len(given) == len(set(given)) <= few
    with pytest.raises(RuntimeError, match="were all taken"):
        ports.free_port()


def test_what_one_process_was_given_no_other_one_is() -> None:
    port = ports.free_port()
    code = f"from tests import ports; print(ports._mark({port}))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout == "False\n"
