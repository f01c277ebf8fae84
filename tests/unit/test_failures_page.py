"""What the documentation shows of failures is what the tests have seen."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.failures import BUILD_FAILURES, KILLED, LIVEKIT_LOST, SESSION_FAILURES

PAGE = Path(__file__).parents[2] / "docs" / "conditions-and-errors.md"


def test_each_failure_that_is_caused_is_in_the_tables_with_its_words_and_no_other_is() -> None:
    _, _, rest = PAGE.read_text().partition("## What each failure says\n")
    section, _, _ = rest.partition("\n## ")
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    assert rows == [failure.row for failure in (*BUILD_FAILURES, *SESSION_FAILURES, KILLED, LIVEKIT_LOST)]
