"""Evictions, and the budgets that refuse them: what the API server's eviction and the disruption controller do."""

from __future__ import annotations

import random
from collections.abc import Callable

from voicepool.kube.api import BUDGETS, PODS, Json, NotFound

from .loop import SeededLoop
from .semantics import selects
from .server import Change, Server


class Evictions:
    """See the module.

    Args:
        server: where pods and budgets are.
        loop: timers.
        chance: the world's randomness.
        tell: the story.
    """

    def __init__(
        self, server: Server, loop: SeededLoop, chance: random.Random, tell: Callable[[str, str], None]
    ) -> None:
        self._server = server
        self._loop = loop
        self._chance = chance
        self._tell = tell
        self._looks = False
        server.observers.append(self._changed)

    def is_refused(self, pod: Json) -> bool:
        """Whether a budget protects the pod from an eviction now; one that does not run is asked for no budget."""
        return pod["status"]["phase"] == "Running" and any(
            len(self._healthy(budget)) <= budget["spec"]["minAvailable"]
            for budget in self._server.all(BUDGETS)
            if _covers(budget, pod)
        )

    def evict(self, pod: Json) -> None:
        """What ``kubectl drain`` asks for; a pod that is let go has the grace of its own."""
        metadata = pod["metadata"]
        if self.is_refused(pod):
            self._tell("eviction", f"of {metadata['name']} is refused")
            return
        self._tell("eviction", f"of {metadata['name']}")
        try:
            self._server.delete(PODS, metadata["namespace"], metadata["name"], "eviction", uid=metadata["uid"])
        except NotFound:
            return

    def _healthy(self, budget: Json) -> list[Json]:
        return [
            pod
            for pod in self._server.all(PODS)
            if _covers(budget, pod)
            and any(
                condition["type"] == "Ready" and condition["status"] == "True"
                for condition in pod["status"].get("conditions") or ()
            )
        ]

    def _changed(self, change: Change) -> None:
        """Kubernetes counts in every budget's status: a new version of it with nearly every call."""
        if change.resource in (PODS, BUDGETS) and not self._looks:
            self._looks = True
            self._loop.call_later(self._chance.uniform(0.05, 1.0), self._count)

    def _count(self) -> None:
        self._looks = False
        for budget in self._server.all(BUDGETS):
            expected = sum(_covers(budget, pod) for pod in self._server.all(PODS))
            counts = {"expectedPods": expected, "currentHealthy": len(self._healthy(budget))}
            key = (budget["metadata"]["namespace"], budget["metadata"]["name"])
            self._server.change(
                BUDGETS,
                key,
                budget["metadata"]["uid"],
                "disruption controller",
                lambda obj, counts=counts: obj.update(status=counts),  # type: ignore[misc]
            )


def _covers(budget: Json, pod: Json) -> bool:
    labels = budget["spec"]["selector"]["matchLabels"]
    selector = ",".join(f"{name}={value}" for name, value in labels.items())
    same = budget["metadata"]["namespace"] == pod["metadata"]["namespace"]
    return same and selects(selector, pod["metadata"].get("labels"))
