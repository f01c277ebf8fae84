"""Plays the kubelet of one namespace: each new pod becomes Ready at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection

from tests.bench.world import World, until
from voicepool.kube.api import PODS
from voicepool.kube.convert import pod_from_json
from voicepool.kube.informer import Informer
from voicepool.model import LABEL_POOL, BindState, Key, PodFact


class Kubelet:
    """See the module.

    Args:
        world: where the pods are.
        namespace: whose pods become Ready.
    """

    def __init__(self, world: World, namespace: str) -> None:
        self.pods: Informer[PodFact] = Informer(world.api, PODS, namespace, LABEL_POOL, pod_from_json)
        self.bound_seen_at: dict[str, float] = {}
        """When the watch showed that a pod is bound, by its name, in seconds since the epoch."""
        self._world = world
        self._tasks: set[asyncio.Task[PodFact]] = set()
        self.pods.handlers.append(self._changed)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch, and make pods Ready."""
        task = asyncio.create_task(self.pods.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, *self._tasks, return_exceptions=True)

    def warm(self) -> list[PodFact]:
        """Unbound Ready pods, the oldest first."""
        pods = [pod for pod in self.pods if pod.state is BindState.WARM and pod.ready]
        return sorted(pods, key=lambda pod: (pod.created_at, pod.name))

    async def wait_for_warm(self, count: int) -> None:
        """Wait until at least so many pods are warm."""

        async def there() -> bool:
            return len(self.warm()) >= count

        await until(there, poll_seconds=0.002)

    async def take(self, taken: Collection[str]) -> PodFact:
        """Wait for a warm pod whose uid is not among those that were taken before."""

        def free() -> list[PodFact]:
            return [pod for pod in self.warm() if pod.uid not in taken]

        async def there() -> bool:
            return bool(free())

        await until(there, poll_seconds=0.002)
        return free()[0]

    async def wait_for_bound(self, name: str) -> None:
        """Wait until the watch has shown that a pod is bound."""

        async def seen() -> bool:
            return name in self.bound_seen_at

        await until(seen, poll_seconds=0.002)

    def _changed(self, key: Key, old: PodFact | None, new: PodFact | None) -> None:
        if new is not None and new.state is BindState.BOUND:
            self.bound_seen_at.setdefault(new.name, time.time())
        if old is None and new is not None and not new.ready:
            task = asyncio.create_task(self._world.make_ready(*key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
