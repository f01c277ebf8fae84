"""Which of a pool's sessions a list shows, and in which pages. Pure.

Invariants: the newest session comes first, and of two that began together always the same one; a cursor names a place between two sessions, so a page that
is read later misses none that was there all the time and repeats none, however many began or ended meanwhile.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from voicepool.gateway.errors import BadRequest
from voicepool.gateway.records import end_state, session_state
from voicepool.model import PodFact

State = Literal["active", "bound", "ending", "ended"]
"""``active`` is every state but ``ended``. What only an agent can say of itself (accepted, joined) is not asked for in a list."""

_Place = tuple[datetime, str]
"""When a session was bound, and its pod's uid."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which sessions are wanted; None wants all."""

    state: State | None = None
    end_state: str | None = None
    """As Pipecat Cloud's client says it, see :func:`~voicepool.gateway.records.end_state`."""
    created_after: datetime | None = None
    created_before: datetime | None = None
    template: str | None = None

    def wants(self, pod: PodFact) -> bool:
        """Whether a session is among them."""
        created_at, _ = _place(pod)
        state = session_state(pod)
        return (
            (self.state is None or state == self.state or (self.state == "active" and state != "ended"))
            and (self.end_state is None or end_state(pod) == self.end_state)
            and (self.created_after is None or created_at > self.created_after)
            and (self.created_before is None or created_at < self.created_before)
            and (self.template is None or pod.template_hash == self.template)
        )


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the sessions."""

    pods: tuple[PodFact, ...]
    total: int
    """How many there are on all pages."""
    cursor: str | None
    """Leads to the next page; None on the last one."""


def page_of(pods: Iterable[PodFact], wanted: Filter, *, limit: int, offset: int = 0, cursor: str | None = None) -> Page:
    """One page of the sessions that are wanted.

    Args:
        pods: all of the pool.
        wanted: which of them.
        limit: how many at most.
        offset: how many to leave out at the beginning, or after the cursor.
        cursor: of the page before.

    Raises:
        BadRequest: the cursor is none of ours.
    """
    after = None if cursor is None else _read(cursor)
    found = sorted((pod for pod in pods if pod.session and wanted.wants(pod)), key=_place, reverse=True)
    rest = found if after is None else [pod for pod in found if _place(pod) < after]
    page = rest[offset : offset + limit]
    more = len(rest) > offset + limit
    return Page(tuple(page), len(found), _write(page[-1]) if page and more else None)


def _place(pod: PodFact) -> _Place:
    return pod.bound_at or pod.created_at, pod.uid


def _write(pod: PodFact) -> str:
    moment, uid = _place(pod)
    return base64.urlsafe_b64encode(f"{moment.isoformat()} {uid}".encode()).decode().rstrip("=")


def _read(cursor: str) -> _Place:
    try:
        moment, _, uid = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().partition(" ")
        place = (datetime.fromisoformat(moment), uid)
    except (ValueError, binascii.Error):
        place = None
    if place is None or place[0].tzinfo is None:
        raise BadRequest("The cursor is not from a list of sessions; leave it out to begin at the newest.")
    return place
