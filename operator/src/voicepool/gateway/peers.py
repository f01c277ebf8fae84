"""The other gateways, of which each knows only its own callers. They are asked when somebody wants to know, and found through their Service's endpoints.

Invariants: nothing is written anywhere; a gateway that does not answer in time is left out, and the answer says how many that are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from voicepool.gateway.view import PoolKey
from voicepool.kube.api import ENDPOINT_SLICES, KubeApi, KubeApiError
from voicepool.sizing import NOBODY, WINDOWS_SECONDS, Unmet

log = logging.getLogger("voicepool.gateway")

PORT_NAME = "http"
ADDRESSES_SECONDS = 5.0
"""How long addresses are taken for true."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the other gateways said together."""

    unmet: Unmet
    asked: int
    answered: int


ALONE = Answers(NOBODY, 0, 0)


def unmet_path(key: PoolKey) -> str:
    """Where a gateway tells another one about its own callers."""
    return f"/metrics/v1/namespaces/{key[0]}/pools/{key[1]}/unmet"


class Peers:
    """Asks the other gateways.

    Args:
        kube: the API server.
        http: the session for the questions.
        namespace: of the gateways' Service.
        service: its name; None where this gateway is the only one.
        identity: this gateway's pod.
        monotonic: seconds that never go back.
        timeout_seconds: for one answer.
    """

    def __init__(
        self,
        kube: KubeApi,
        http: aiohttp.ClientSession,
        *,
        namespace: str | None,
        service: str | None,
        identity: str,
        monotonic: Callable[[], float],
        timeout_seconds: float,
    ) -> None:
        self._kube = kube
        self._http = http
        self._namespace = namespace
        self._service = service
        self._identity = identity
        self._monotonic = monotonic
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._addresses: tuple[str, ...] = ()
        self._good_until = float("-inf")

    async def unmet(self, key: PoolKey) -> Answers:
        """The callers of a pool who were not bound, at all other gateways."""
        if self._service is None:
            return ALONE
        await self._find()
        told = await asyncio.gather(*(self._ask(address, key) for address in self._addresses))
        known = [unmet for unmet in told if unmet is not None]
        return Answers(sum(known, NOBODY), asked=len(told), answered=len(known))

    async def _find(self) -> None:
        if self._monotonic() < self._good_until:
            return
        try:
            page = await self._kube.list_page(
                ENDPOINT_SLICES, self._namespace, label_selector=f"kubernetes.io/service-name={self._service}"
            )
        except KubeApiError as error:
            # The old addresses are better than none.
            log.warning("the other gateways cannot be looked up", extra={"error": str(error)})
            return
        found: set[str] = set()
        for part in page.get("items") or ():
            ports = [port["port"] for port in part.get("ports") or () if port.get("name") == PORT_NAME]
            for endpoint in part.get("endpoints") or ():
                target = endpoint.get("targetRef") or {}
                # None counts as true. One that is going has no new callers, but still those who wait.
                serving = (endpoint.get("conditions") or {}).get("serving") is not False
                if ports and serving and target.get("name") != self._identity:
                    found.update(_authority(address, ports[0]) for address in endpoint["addresses"][:1])
        self._addresses = tuple(sorted(found))
        self._good_until = self._monotonic() + ADDRESSES_SECONDS

    async def _ask(self, address: str, key: PoolKey) -> Unmet | None:
        try:
            async with self._http.get(f"http://{address}{unmet_path(key)}", timeout=self._timeout) as answer:
                answer.raise_for_status()
                said = await answer.json()
            unmet = Unmet(int(said["waiting"]), tuple(int(count) for count in said["rejected"]))
        except (aiohttp.ClientError, TimeoutError, ValueError, TypeError, KeyError) as error:
            log.warning("another gateway does not answer", extra={"address": address, "error": repr(error)})
            return None
        return unmet if len(unmet.rejected) == len(WINDOWS_SECONDS) else None


def _authority(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
