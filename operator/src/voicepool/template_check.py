"""Asks the API server what it says to a pod of a pool's template: by a dry run, once for a template, and again after a refusal."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from voicepool.kube.api import PODS, Forbidden, KubeApi, Unprocessable
from voicepool.model import Key, PoolFact
from voicepool.plan import Template
from voicepool.podspec import PodSettings, build_pod, pod_name, template_hash

TEMPLATE_RECHECK_SECONDS = 15.0
"""A refusal can have a cause outside of the template (a quota, a missing service account), so it is asked about again."""
RIGHTS_RECHECK_SECONDS = 1.0
"""An API server that has just started knows nobody's rights for a moment, and callers wait."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the API server said about a template."""

    hash: str
    error: str | None
    checked_at: float

    def good_for_seconds(self) -> float:
        """How long a refusal is believed."""
        ours = self.error is not None and " cannot create resource " in self.error
        return RIGHTS_RECHECK_SECONDS if ours else TEMPLATE_RECHECK_SECONDS


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
        if (
            verdict is None
            or verdict.hash != hash_
            or (verdict.error is not None and time - verdict.checked_at >= verdict.good_for_seconds())
        ):
            verdict = _Verdict(hash_, await self._dry_run(pool, hash_), time)
            self._verdicts[key] = verdict
        return Template(hash_, verdict.error)

    def refused(self, pool: PoolFact, hash_: str, error: str) -> None:
        """A pod of that template was refused when it was to be created."""
        self._verdicts[(pool.namespace, pool.name)] = _Verdict(hash_, error, asyncio.get_running_loop().time())

    def asked_again_after_seconds(self, pool: Key) -> float:
        """How long the refusal of a pool's template is believed."""
        return self._verdicts[pool].good_for_seconds()

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
