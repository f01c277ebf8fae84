"""Stories that once went wrong and are short to tell: each is a bug that was found here."""

from __future__ import annotations

import logging

import pytest

from .stories import play


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(20124, id="a-waiter-who-gives-up-as-a-pod-comes"),
        pytest.param(20126, id="a-bind-of-another-gateway-for-the-same-session"),
        pytest.param(1173, id="a-late-pod-in-the-place-of-its-successor"),
        pytest.param(40, id="a-failed-cold-start-and-maxPods"),
    ],
)
def test_what_went_wrong_once_stays_right(seed: int) -> None:
    logging.disable(logging.CRITICAL)
    try:
        assert not play(seed).problems
    finally:
        logging.disable(logging.NOTSET)
