"""Keeps the PodDisruptionBudgets of the pools as :mod:`voicepool.disruption` wants them. The only writer of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from voicepool.copies import BY_POOL
from voicepool.disruption import BudgetFact, budget, budget_change, budget_name, budget_spec
from voicepool.kube.api import BUDGETS, AlreadyExists, Conflict, Json, KubeApi, NotFound
from voicepool.kube.informer import Informer
from voicepool.metrics import OperatorMetrics
from voicepool.model import Key

logger = logging.getLogger(__name__)


class BudgetKeeper:
    """Creates, mends and deletes budgets.

    Args:
        api: the API server.
        copy: a running informer from :func:`voicepool.copies.budget_informer`; without it nothing is kept.
        metrics: where conflicts are counted.
        changed: called with the key of a pool whose budget has to be looked at.
    """

    def __init__(
        self, api: KubeApi, copy: Informer[BudgetFact] | None, metrics: OperatorMetrics, changed: Callable[[Key], None]
    ) -> None:
        self._api = api
        self._copy = copy
        self._conflicts = metrics.conflicts.labels("budget")
        self._changed = changed
        if copy is not None:
            copy.handlers.append(self._budget_changed)

    async def known(self) -> None:
        """Wait until it is known which budgets there are."""
        if self._copy is not None:
            await self._copy.synced.wait()

    def pools(self) -> Sequence[Key]:
        """The keys of the pools that have one."""
        return [] if self._copy is None else self._copy.values_of(BY_POOL)  # type: ignore[return-value]

    def has(self, pool: Key) -> bool:
        """Whether the pool has one, as far as is known."""
        return self._of(pool) is not None

    async def keep(self, pool: Key, *, wanted: bool) -> None:
        """Create, mend or delete the pool's budget, if it is not as it should be.

        Raises:
            KubeApiError: that did not work; the pool should be looked at again.
        """
        if self._copy is None or not self._copy.synced.is_set():
            return
        namespace, pool_name = pool
        name = budget_name(pool_name)
        there = self._of(pool)
        change = budget_change(wanted=wanted, there=there)
        try:
            if change == "create":
                self._copy.apply(await self._api.create(BUDGETS, namespace, budget(namespace, pool_name)))
            elif change == "replace" and there is not None:
                operations: list[Json] = [
                    {"op": "test", "path": "/metadata/uid", "value": there.uid},
                    {"op": "replace", "path": "/spec", "value": budget_spec(pool_name)},
                ]
                self._copy.apply(await self._api.json_patch(BUDGETS, namespace, name, operations))
            elif change == "delete" and there is not None:
                await self._api.delete(BUDGETS, namespace, name, uid=there.uid, resource_version=there.resource_version)
                self._copy.forget(namespace, name, there.uid)
        except AlreadyExists:
            logger.warning(
                "a PodDisruptionBudget of this name is not the pool's; delete it, or the pool's calls are not protected",
                extra={"namespace": namespace, "pool": pool_name, "budget": name},
            )
            self._conflicts.inc()
        except NotFound:
            self._conflicts.inc()
        except Conflict:
            self._conflicts.inc()
            # Kubernetes counts in a budget all the time, and a watch may have missed the last of that.
            self._copy.apply(await self._api.get(BUDGETS, namespace, name))
            raise

    def _of(self, pool: Key) -> BudgetFact | None:
        namespace, pool_name = pool
        return None if self._copy is None else self._copy.get(namespace, budget_name(pool_name))

    def _budget_changed(self, _key: Key, old: BudgetFact | None, new: BudgetFact | None) -> None:
        for one in (old, new):
            # Kubernetes counts pods in a budget's status, which makes a new version with every call.
            if one is not None and (old is None or new is None or old.as_wanted != new.as_wanted):
                self._changed((one.namespace, one.pool))
