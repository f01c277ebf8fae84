"""The demo's own words, without a cluster. That it works is seen by running it; its parts are what `test_calls` uses."""

from __future__ import annotations

import pytest
from tests.e2e.conversation import Moment
from tests.e2e.demo import RECORDED, Report, main, print_calls


def test_a_call_without_a_cluster_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["call", "--name", "never-made"]) == 1
    said = capsys.readouterr().err
    assert "What to do: " in said
    assert "Traceback" not in said


def test_two_calls_are_laid_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    said = [("agent", "Hello.")]
    warm = Report("warm agent", "p-1", [Moment("request sent", 0.0), Moment("bound", 0.02)], said, RECORDED / "w.wav")
    cold = Report("cold start", "p-2", [Moment("request sent", 0.0), Moment("bound", 4.5)], said, RECORDED / "c.wav")
    print_calls(warm, cold)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["bound", "0.020", "s", "4.500", "s"] in lines
    assert ["agent", '"Hello."'] in lines
