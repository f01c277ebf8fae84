"""What the tests on a cluster share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Show = Callable[[str], None]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Prints figures also where a test passes."""

    def printed(line: str) -> None:
        with capsys.disabled():
            print(f"\n    {line}", end="", flush=True)

    return printed
