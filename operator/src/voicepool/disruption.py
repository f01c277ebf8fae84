"""What protects calls from the cluster's own housekeeping: annotations that the bind writes, and one PodDisruptionBudget for each pool. Pure.

Invariants: a warm pod never holds up a node; the budget selects bound pods alone, and asks for more of them than any pool has, as an integer:
a percentage or ``maxUnavailable`` would be counted against ``spec.replicas``, which does not contain them. The budget has no owner, since it must
outlive a deleted pool for as long as that pool's calls go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from voicepool.model import LABEL_POOL, LABEL_STATE, BindState, Disruption

Json = dict[str, Any]

SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"
DO_NOT_DISRUPT = "karpenter.sh/do-not-disrupt"

MORE_THAN_ANY_POOL_HAS = 2_147_483_647


@dataclass(frozen=True, slots=True)
class BudgetFact:
    """One PodDisruptionBudget of a pool as last seen."""

    namespace: str
    name: str
    uid: str
    resource_version: str
    pool: str
    as_wanted: bool
    """Its spec is that of :func:`budget`."""


def protection(policy: Disruption) -> Mapping[str, str]:
    """The annotations that a pod gets with its call."""
    if policy is Disruption.ALWAYS:
        # Without a word the Cluster Autoscaler keeps a pod that has no owner, as a bound pod has none.
        return {SAFE_TO_EVICT: "true"}
    return {SAFE_TO_EVICT: "false", DO_NOT_DISRUPT: "true"}


def budget_name(pool_name: str) -> str:
    """The name of a pool's budget."""
    return f"{pool_name}-bound"


def budget(namespace: str, pool_name: str) -> Json:
    """The budget that lets no bound pod of the pool be evicted."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": budget_name(pool_name),
            "namespace": namespace,
            "labels": {LABEL_POOL: pool_name},
        },
        "spec": budget_spec(pool_name),
    }


def budget_spec(pool_name: str) -> Json:
    """What a budget asks for. Bound pods are not Ready, so ``unhealthyPodEvictionPolicy`` must stay away: AlwaysAllow would let them all go."""
    return {
        "minAvailable": MORE_THAN_ANY_POOL_HAS,
        "selector": {"matchLabels": {LABEL_POOL: pool_name, LABEL_STATE: BindState.BOUND.value}},
    }


def budget_change(*, wanted: bool, there: BudgetFact | None) -> Literal["create", "replace", "delete"] | None:
    """What to do about a pool's budget; None where it is as it should be."""
    if there is None:
        return "create" if wanted else None
    if not wanted:
        return "delete"
    return None if there.as_wanted else "replace"
