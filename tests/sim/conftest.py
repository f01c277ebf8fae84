"""What every test of the simulation needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nobody reads what a simulated process logs; its story tells more."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
