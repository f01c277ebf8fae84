"""The PodDisruptionBudget that protects calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from voicepool.disruption import BudgetFact, budget, budget_change
from voicepool.kube.convert import budget_from_json


def stored(**changes: Any) -> dict[str, Any]:
    obj = copy.deepcopy(budget("calls", "demo"))
    obj["metadata"] |= {"uid": "u", "resourceVersion": "7"}
    obj["spec"] |= changes
    return obj


def fact(**changes: Any) -> BudgetFact:
    found = budget_from_json(stored(**changes))
    assert found is not None
    return found


def test_it_asks_for_more_bound_pods_than_any_pool_has() -> None:
    assert stored()["spec"] == {
        "minAvailable": 2147483647,
        "selector": {"matchLabels": {"voicepool.dev/pool": "demo", "voicepool.dev/state": "bound"}},
    }


def test_it_has_no_owner_since_calls_go_on_without_their_pool() -> None:
    assert "ownerReferences" not in stored()["metadata"]


def test_what_it_should_be_is_recognized() -> None:
    assert fact().as_wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"minAvailable": 1},
        {"minAvailable": "100%"},
        {"unhealthyPodEvictionPolicy": "AlwaysAllow"},
        {"selector": {"matchLabels": {"voicepool.dev/pool": "demo"}}},
    ],
)
def test_whatever_would_let_calls_go_is_noticed(changes: dict[str, Any]) -> None:
    assert not fact(**changes).as_wanted


def test_a_budget_of_somebody_else_does_not_concern_us() -> None:
    assert budget_from_json({"metadata": {"name": "demo-bound"}}) is None
    own = {"name": "mine", "labels": {"voicepool.dev/pool": "demo"}}
    assert budget_from_json({"metadata": own}) is None


def test_what_has_to_be_done() -> None:
    bad = fact(minAvailable=1)
    for wanted, there, expected in (
        (True, None, "create"),
        (True, fact(), None),
        (True, bad, "replace"),
        (False, None, None),
        (False, bad, "delete"),
    ):
        assert budget_change(wanted=wanted, there=there) == expected
