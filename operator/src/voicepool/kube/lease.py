"""Who works: leader election on a ``coordination.k8s.io/v1`` Lease, by the rules of client-go.

Invariants:

* Clocks of different machines are never compared. Whoever waits counts from the moment at which it saw the record change, on its own
  monotonic clock; the times written into the Lease are for people.
* Whoever leads counts from before it asked for the renewal, and stops when ``renew_deadline_seconds`` are over, which is before anybody else
  may take the Lease.
* Every write names the version it was decided on, so of two candidates one wins. A write whose answer did not come is read again, never assumed.
* The work has ended before the Lease is given back.

A Lease is no fence: a process that was frozen may still send what it had begun. Whatever runs under it has to be safe with two leaders.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from voicepool.kube.api import LEASES, Conflict, Json, KubeApi, KubeApiError, NotFound

logger = logging.getLogger(__name__)

MAX_DURATION_SECONDS = 3600
"""A record that claims more than this is not believed: somebody has written nonsense."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """How long everything takes. The defaults are Kubernetes' own."""

    duration_seconds: float = 15.0
    """Nobody takes a Lease whose record has changed within this time."""
    renew_deadline_seconds: float = 10.0
    """Whoever leads stops when no renewal has succeeded for so long."""
    retry_seconds: float = 2.0
    """Between two renewals."""
    look_seconds: float = 1.0
    """Between two looks of a candidate. A look is one read, and a Lease that was given back is taken that soon."""
    request_seconds: float = 5.0
    """How long one request may take, so that a second one fits into the deadline."""

    def __post_init__(self) -> None:
        if not self.retry_seconds < self.renew_deadline_seconds < self.duration_seconds:
            raise ValueError("retry_seconds < renew_deadline_seconds < duration_seconds must hold")


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A Lease as it was read."""

    version: str
    holder: str
    """Empty when it was given back."""
    duration_seconds: float
    acquired: str | None
    transitions: int

    @classmethod
    def from_json(cls, obj: Json, default_duration_seconds: float) -> LeaseRecord:
        """Total: whatever stands in a Lease is read; what makes no sense is replaced by our own duration."""
        spec = obj.get("spec") or {}
        duration = spec.get("leaseDurationSeconds") or 0
        return cls(
            version=obj["metadata"]["resourceVersion"],
            holder=spec.get("holderIdentity") or "",
            duration_seconds=duration if 0 < duration <= MAX_DURATION_SECONDS else default_duration_seconds,
            acquired=spec.get("acquireTime"),
            transitions=spec.get("leaseTransitions") or 0,
        )


class Step(StrEnum):
    """What comes next."""

    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"


def next_step(record: LeaseRecord | None, unchanged_seconds: float, identity: str, *, missing: bool = False) -> Step:
    """Decide from what is known of the Lease.

    Args:
        record: as last read; None where nobody has ever seen one.
        unchanged_seconds: how long ago this very version was seen for the first time, on our own clock.
        identity: our name.
        missing: the Lease is not there any more. Whoever held it does not know yet, so it counts for as long as it would have.
    """
    if record is None:
        return Step.CREATE
    if record.holder == identity:
        return Step.CREATE if missing else Step.RENEW
    if not record.holder or unchanged_seconds >= record.duration_seconds:
        return Step.CREATE if missing else Step.TAKE
    return Step.WAIT


def lease_spec(step: Step, record: LeaseRecord | None, identity: str, duration_seconds: float, now: datetime) -> Json:
    """The spec that a step writes. A Lease that changes hands counts it."""
    moment = _micro_time(now)
    known = record.acquired if record and step is Step.RENEW else None
    transitions = record.transitions if record else 0
    return {
        "holderIdentity": identity,
        "leaseDurationSeconds": round(duration_seconds),
        "acquireTime": known or moment,
        "renewTime": moment,
        "leaseTransitions": transitions + 1 if step is Step.TAKE else transitions,
    }


class Election:
    """One candidate for one Lease.

    Args:
        api: the API server.
        namespace: of the Lease.
        name: of the Lease; it is made where it is missing.
        identity: our name, different from every other candidate's.
        times: see there.
        clock: monotonic seconds; read when it counts, so not an event loop's, which stands still within one turn.
        now: the time, with a time zone; for people only.
        jitter: source of randomness, so that candidates do not look all at once.
        on_change: told True when we begin to lead and False when that is over.
    """

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        name: str,
        identity: str,
        *,
        times: LeaseTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: random.Random | None = None,
        on_change: Callable[[bool], None] = lambda leading: None,
    ) -> None:
        self.identity = identity
        self.error: str | None = None
        """Why the last request about the Lease failed; None where it did not."""
        self._api = api
        self._namespace = namespace
        self._name = name
        self._times = times or LeaseTimes()
        self._clock = clock
        self._now = now
        self._jitter = jitter or random.Random()
        self._on_change = on_change
        self._record: LeaseRecord | None = None
        self._seen_at = 0.0
        """When the record's version was seen for the first time."""
        self._missing = True
        self._must_read = True
        self._valid_until = float("-inf")
        self._contact_at = float("-inf")

    @property
    def holder(self) -> str:
        """Who leads, as far as we know; empty for nobody."""
        return self._record.holder if self._record else ""

    def leading(self) -> bool:
        """Whether the Lease is ours at this very moment, by the clock and not by what a task has got round to notice."""
        return self._clock() < self._valid_until

    def silence_seconds(self) -> float:
        """Seconds since the API server last answered about the Lease; infinite before the first answer."""
        return self._clock() - self._contact_at

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work whenever the Lease is ours, until cancelled.

        Raises:
            Exception: what ended the work; the Lease has been given back then.
        """
        try:
            while True:
                if await self._attempt():
                    await self._lead(work)
                await asyncio.sleep(self._times.look_seconds * self._jitter.uniform(0.8, 1.2))
        finally:
            await self._give_back()

    async def _lead(self, work: Callable[[], Awaitable[None]]) -> None:
        logger.info("leading", extra={"lease": self._name, "identity": self.identity})
        self._on_change(True)
        working = asyncio.ensure_future(work())
        try:
            while self.leading():
                await asyncio.wait({working}, timeout=self._until_renewal())
                if working.done():
                    working.result()
                    raise RuntimeError("the work under the Lease ended by itself")
                await self._attempt()
            logger.warning(
                "not leading any more",
                extra={"lease": self._name, "identity": self.identity, "holder": self.holder, "error": self.error},
            )
        finally:
            self._on_change(False)
            raised = working.done()
            working.cancel()
            await asyncio.wait({working})
            if not raised and not working.cancelled() and working.exception() is not None:
                logger.warning("the work ended with an error when it was stopped", exc_info=working.exception())

    def _until_renewal(self) -> float:
        return max(0.0, min(self._times.retry_seconds, self._valid_until - self._clock()))

    async def _attempt(self) -> bool:
        """One round: read where that is needed, write where that is allowed; returns whether the Lease is ours."""
        asked_at = self._clock()
        # Within the deadline, so that an answer which does not come cannot make us lead for longer.
        left = self._valid_until - asked_at if self.leading() else self._times.request_seconds
        try:
            async with asyncio.timeout(min(left, self._times.request_seconds)):
                await self._round()
            self.error = None
        except (KubeApiError, TimeoutError) as error:
            self._must_read = True
            words = str(error) or f"no answer within {self._times.request_seconds:g} s"
            if self.error is None:
                logger.warning("the Lease cannot be read or written", extra={"lease": self._name, "error": words})
            self.error = words
        return self.leading()

    async def _round(self) -> None:
        if self._must_read or not self.leading():
            await self._read()
        step = next_step(self._record, self._clock() - self._seen_at, self.identity, missing=self._missing)
        if step is Step.WAIT:
            self._valid_until = float("-inf")
            return
        asked_at = self._clock()
        spec = lease_spec(step, self._record, self.identity, self._times.duration_seconds, self._now())
        try:
            if self._missing or self._record is None:
                body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}}
                stored = await self._api.create(LEASES, self._namespace, {**body, "spec": spec})
            else:
                stored = await self._write(self._record.version, spec)
        except Conflict:
            # Somebody wrote in between, or we did and heard no answer; only a read can tell.
            await self._read()
            if self.holder != self.identity:
                self._valid_until = float("-inf")
            return
        self._take_over(stored)
        self._valid_until = asked_at + self._times.renew_deadline_seconds

    async def _read(self) -> None:
        try:
            self._take_over(await self._api.get(LEASES, self._namespace, self._name))
        except NotFound:
            self._missing, self._contact_at = True, self._clock()
        self._must_read = False

    async def _write(self, version: str, spec: Json) -> Json:
        body: dict[str, Any] = {"metadata": {"resourceVersion": version}, "spec": spec}
        try:
            return await self._api.merge_patch(LEASES, self._namespace, self._name, body)
        except NotFound:
            raise Conflict("the Lease has been deleted", status=409) from None

    def _take_over(self, obj: Json) -> None:
        record = LeaseRecord.from_json(obj, self._times.duration_seconds)
        self._missing, self._contact_at = False, self._clock()
        if self._record is None or self._record.version != record.version:
            self._record, self._seen_at = record, self._contact_at

    async def _give_back(self) -> None:
        """Let the next one begin at once instead of waiting. Best effort: what is not given back runs out."""
        record, ours = self._record, self.leading()
        self._valid_until = float("-inf")
        if not ours or record is None or record.holder != self.identity:
            return
        spec = {
            "holderIdentity": "",
            "leaseDurationSeconds": 1,
            "acquireTime": _micro_time(self._now()),
            "renewTime": _micro_time(self._now()),
        }
        try:
            async with asyncio.timeout(self._times.request_seconds):
                try:
                    await self._write(record.version, spec)
                except Conflict:
                    # A renewal of ours that was cut off may have been done all the same.
                    await self._read()
                    if self._record is not None and self._record.holder == self.identity:
                        await self._write(self._record.version, spec)
            logger.info("Lease given back", extra={"lease": self._name, "identity": self.identity})
        except (KubeApiError, TimeoutError) as error:
            logger.warning("the Lease was not given back and has to run out", extra={"error": str(error)})


def _micro_time(moment: datetime) -> str:
    """Kubernetes' MicroTime, which wants six digits."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
