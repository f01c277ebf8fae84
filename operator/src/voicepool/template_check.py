"""Asks the API server what it says to a pod of a pool's template: by a dry run, once for a template, and again after a refusal."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from voicepool.kube.api import PODS, Forbidden, KubeApi, Unprocessable
from voicepool.model import Key, PoolFact
from voicepool.plan import Template
from voicepool.podspec import PodSettings, build_pod, pod_name, template_hash

RECHECK_SECONDS = 1.0
"""A refusal can have a cause outside of the template that is gone in a moment (the service account of a new namespace, rights that an API server which
has just started does not know yet), so it is asked about again; after each further refusal for another reason than rights, twice as late."""
LONGEST_RECHECK_SECONDS = 15.0
"""For a cause that stays, as a quota or a spelling mistake."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the API server said about a template."""

    hash: str
    error: str | None
    checked_at: float
    refusals: int
    """Of this template so far, this one included."""

    def good_for_seconds(self) -> float:
        """How long a refusal is believed."""
        if self.error is not None and " cannot create resource " in self.error:
            return RECHECK_SECONDS
        # A pool can be refused for days, and 2.0 ** 1024 is no number any more.
        return min(LONGEST_RECHECK_SECONDS, RECHECK_SECONDS * 2.0 ** min(self.refusals - 1, 10))

    def is_believed(self, time: float) -> bool:
        """Whether it is a refusal about which it is too early to ask again."""
        return self.error is not None and time - self.checked_at < self.good_for_seconds()


class TemplateCheck:
    """Knows of each pool whether its template can be made into pods.

    Args:
        api: the API server.
        pod_settings: what every agent pod gets.
    """

    def __init__(self, api: KubeApi, pod_settings: PodSettings) -> None:
        self._api = api
        self._pod_settings = pod_settings
        self._verdicts: dict[Key, _Verdict] = {}

    async def check(self, pool: PoolFact) -> Template:
        """The template's hash, and why it is refused.

        Raises:
            KubeApiError: the API server did not say.
        """
        key = (pool.namespace, pool.name)
        hash_ = template_hash(pool, self._pod_settings)
        time = asyncio.get_running_loop().time()
        verdict = self._verdicts.get(key)
        if verdict is None or verdict.hash != hash_ or (verdict.error is not None and not verdict.is_believed(time)):
            verdict = self._judge(key, hash_, await self._dry_run(pool, hash_), time)
        return Template(hash_, verdict.error)

    def refused(self, pool: PoolFact, hash_: str, error: str) -> None:
        """A pod of that template was refused when it was to be created."""
        self._judge((pool.namespace, pool.name), hash_, error, asyncio.get_running_loop().time())

    def asked_again_after_seconds(self, pool: Key) -> float:
        """How long the refusal of a pool's template is believed."""
        return self._verdicts[pool].good_for_seconds()

    def _judge(self, key: Key, hash_: str, error: str | None, time: float) -> _Verdict:
        before = self._verdicts.get(key)
        if before is None or before.hash != hash_:
            before = _Verdict(hash_, None, time, 0)
        # Creates that went out together are refused together, which is one refusal.
        another = error is not None and not before.is_believed(time)
        verdict = self._verdicts[key] = _Verdict(hash_, error, time, before.refusals + another)
        return verdict

    def forget(self, pool: Key) -> None:
        """The pool is gone."""
        self._verdicts.pop(pool, None)

    async def _dry_run(self, pool: PoolFact, hash_: str) -> str | None:
        body = build_pod(pool, 0, hash_, self._pod_settings)
        # A name of its own, since the pod with this number may exist.
        body["metadata"]["name"] = f"{pod_name(pool.name, hash_, 0)}-dry-run"
        try:
            await self._api.create(PODS, pool.namespace, body, dry_run=True)
        except (Unprocessable, Forbidden) as error:
            return f"The API server refuses a pod of spec.template: {error}"
        return None
