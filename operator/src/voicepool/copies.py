"""The operator's copies of what the cluster holds: pods and budgets by informers of our own, pools as kopf's watch and our lists show them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from voicepool.disruption import BudgetFact
from voicepool.kube.api import BUDGETS, KubeApi
from voicepool.kube.convert import AGENT_PODS, budget_from_json, pod_from_json
from voicepool.kube.informer import Informer
from voicepool.model import LABEL_POOL, Key, PodFact, PoolFact

BY_POOL = "pool"


def pod_informer(
    api: KubeApi,
    namespace: str | None,
    *,
    on_list: Callable[[str], None] = lambda reason: None,
    indexes: dict[str, Callable[[PodFact], Any]] | None = None,
    jitter: random.Random | None = None,
) -> Informer[PodFact]:
    """The copy of all agent pods, with the index :data:`BY_POOL` from (namespace, pool) to pods."""
    return Informer(
        api,
        AGENT_PODS,
        namespace,
        LABEL_POOL,
        pod_from_json,
        indexes={BY_POOL: lambda pod: (pod.namespace, pod.pool), **(indexes or {})},
        on_list=on_list,
        jitter=jitter,
    )


def budget_informer(
    api: KubeApi, namespace: str | None, *, jitter: random.Random | None = None
) -> Informer[BudgetFact]:
    """The copy of all pools' PodDisruptionBudgets, with the index :data:`BY_POOL`."""
    return Informer(
        api,
        BUDGETS,
        namespace,
        LABEL_POOL,
        budget_from_json,
        indexes={BY_POOL: lambda budget: (budget.namespace, budget.pool)},
        jitter=jitter,
    )


class PoolStore:
    """The pools as last seen. Filled by watch events, answers to our own writes, and now and then by a full list, which drops what is gone."""

    def __init__(self) -> None:
        self._pools: dict[Key, PoolFact] = {}

    def __iter__(self) -> Iterator[PoolFact]:
        return iter(tuple(self._pools.values()))

    def get(self, key: Key) -> PoolFact | None:
        """The pool, or None."""
        return self._pools.get(key)

    def apply(self, pool: PoolFact) -> bool:
        """Take a pool over unless a newer version is here; returns whether anything changed."""
        key = (pool.namespace, pool.name)
        known = self._pools.get(key)
        if known is not None and int(known.resource_version) >= int(pool.resource_version):
            return False
        self._pools[key] = pool
        return True

    def remove(self, key: Key, uid: str) -> bool:
        """Drop the pool, unless another one has taken its name; returns whether it was here."""
        known = self._pools.get(key)
        if known is None or known.uid != uid:
            return False
        del self._pools[key]
        return True

    def replace(self, pools: Iterable[PoolFact], position: int) -> set[Key]:
        """Take over a full list of that resource version; returns the keys that changed."""
        listed = {(pool.namespace, pool.name): pool for pool in pools}
        changed = {key for key, pool in listed.items() if self.apply(pool)}
        for key, known in list(self._pools.items()):
            if key not in listed and int(known.resource_version) <= position:
                del self._pools[key]
                changed.add(key)
        return changed
