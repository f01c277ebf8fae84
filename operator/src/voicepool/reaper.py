"""Finds pods that were bound and whose agent never got the session, and has them deleted.

A gateway that dies between bind and delivery leaves such a pod behind. Invariants: only the agent's own word "parked" makes a pod undelivered, and
only when no assignment for it can still be good (see :data:`~voicepool.binding.DELIVERY_DEADLINE_SECONDS`); one that cannot be asked is asked again
later and never reaped for that; the pod is deleted in the very version that was judged; an agent that has its session is not asked again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from voicepool.agents import AgentStatus
from voicepool.binding import DELIVERY_DEADLINE_SECONDS
from voicepool.kube.api import KubeApiError
from voicepool.kube.informer import Informer
from voicepool.model import BindState, Key, PodFact

logger = logging.getLogger(__name__)

ASK_AFTER_SECONDS = DELIVERY_DEADLINE_SECONDS + 15.0
"""From when the bind was first seen here, which no clock but our own decides. The margin is for agents' clocks that go slow."""
ASKED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class _Due:
    at: float
    key: Key
    uid: str


class Reaper:
    """Asks each bound pod's agent once whether it has its session.

    Args:
        pods: the running copy of all agent pods.
        ask: asks an agent; None when it cannot be asked.
        reap: deletes a pod in the version that it is given, or finds that it has changed.
    """

    def __init__(
        self,
        pods: Informer[PodFact],
        ask: Callable[[PodFact], Awaitable[AgentStatus | None]],
        reap: Callable[[PodFact], Awaitable[None]],
    ) -> None:
        self._pods = pods
        self._ask = ask
        self._reap = reap
        self._due: deque[_Due] = deque()
        self._watched: set[str] = set()
        """Calls by uid, also those whose agent has answered, until they end."""
        self._news = asyncio.Event()

    def pod_changed(self, key: Key, old: PodFact | None, new: PodFact | None) -> None:
        """A handler of the informer."""
        if new is not None and _is_call(new):
            self._watch(key, new)
        for pod in (old, new):
            if pod is not None and (new is None or pod.uid != new.uid or not _is_call(new)):
                self._watched.discard(pod.uid)

    async def run(self) -> None:
        """Ask until cancelled; may be called again after that, and then forgets what it knew."""
        self._due.clear()
        self._watched.clear()
        for pod in self._pods:
            if _is_call(pod):
                self._watch((pod.namespace, pod.name), pod)
        loop = asyncio.get_running_loop()
        while True:
            while not self._due:
                self._news.clear()
                await self._news.wait()
            # All wait equally long, so the first is due first.
            await asyncio.sleep(max(0.0, self._due[0].at - loop.time()))
            batch: list[_Due] = []
            while self._due and self._due[0].at <= loop.time() and len(batch) < ASKED_AT_ONCE:
                batch.append(self._due.popleft())
            await asyncio.gather(*(self._look(due) for due in batch))

    def _watch(self, key: Key, pod: PodFact) -> None:
        if pod.uid not in self._watched:
            self._watched.add(pod.uid)
            self._put(key, pod.uid)

    def _put(self, key: Key, uid: str) -> None:
        self._due.append(_Due(asyncio.get_running_loop().time() + ASK_AFTER_SECONDS, key, uid))
        self._news.set()

    async def _look(self, due: _Due) -> None:
        pod = self._pods.get(*due.key)
        if pod is None or pod.uid != due.uid or not _is_call(pod):
            return
        status = await self._ask(pod)
        if status is not None and status.state in ("accepted", "joined", "ending"):
            return
        if status is not None and status.state == "parked":
            try:
                await self._reap(pod)
            except KubeApiError as error:
                logger.warning(
                    "could not delete a pod that never got its session, trying again",
                    extra={"namespace": pod.namespace, "pod": pod.name, "error": str(error)},
                )
        self._put(due.key, due.uid)


def _is_call(pod: PodFact) -> bool:
    return pod.state is BindState.BOUND and not pod.finished and not pod.deleting
