"""Label selectors as Kubernetes writes them."""

from __future__ import annotations

import pytest
from tests.sim.semantics import selects

from voicepool.gateway.label_selector import Selector, matches, parse

LABELS = {"language": "fr", "example.org/tier": "gold", "gpu": ""}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"language": "fr"}, True),
        ({"language": "fr", "example.org/tier": "free"}, False),
        ({}, True),
        ("", True),
        ("language=fr", True),
        ("language==fr, example.org/tier = gold", True),
        ("language in (de, fr)", True),
        ("language in (de),gpu", False),
        ("example.org/tier notin (free)", True),
        ("colour notin (red)", True),
        ("colour!=red", True),
        ("language!=fr", False),
        ("gpu", True),
        ("gpu=", True),
        ("!gpu", False),
        ("! colour", True),
        ("in in (in)", False),
    ],
)
def test_a_selector_matches_as_in_kubernetes(selector: Selector, expected: bool) -> None:
    assert matches(parse(selector), LABELS) is expected
    if isinstance(selector, str) and "! " not in selector:
        assert selects(selector, LABELS) is expected


@pytest.mark.parametrize(
    "selector",
    [
        "language=fr,",
        ",",
        "a b",
        "a in fr",
        "a in (b",
        "!a=b",
        "a>1",
        "-a=b",
        "a=b_",
        "a=-b",
        {"a": "b c"},
        {"a b": "c"},
        {"a": "b" * 64},
    ],
)
def test_what_is_no_selector_is_refused(selector: Selector) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse(selector)
