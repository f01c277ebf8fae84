"""What can be asked of the session API: each call as a value, and how its answer is read. Pure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from voicepool.session_api import (
    Log,
    LogLine,
    Session,
    SessionList,
    SessionRecord,
    StartBody,
    Terminated,
    TokenAnswer,
)

T = TypeVar("T")

WaitFor = Literal["accepted", "joined"]
State = Literal["active", "bound", "ending", "ended"]
EndMode = Literal["drain", "cancel"]
Selector = str | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and what becomes of its answer."""

    method: str
    path: str
    read: Callable[[bytes], T]
    """Raises ValueError where the answer is not what it should be."""
    status: int = 200
    """Of an answer that is no error."""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = field(default=None, repr=False)
    """JSON."""
    repeatable: bool = True
    """Sent twice it does no more than sent once."""


def start(
    pool: str | None,
    *,
    body: Any,
    pools: Sequence[str] | None,
    selector: Selector | None,
    namespace: str | None,
    session_id: str | None,
    idempotency_key: str | None,
    wait_for: WaitFor,
    traceparent: str | None,
    make_key: bool,
) -> Call[Session]:
    """A start. With ``make_key`` it can be repeated, whatever the caller named.

    Raises:
        ValueError: an argument is none that the gateway takes.
    """
    wishes = {
        "pool": None if pool is None else _named(pool),
        "pools": None if pools is None else list(pools),
        "selector": dict(selector) if isinstance(selector, Mapping) else selector,
        "namespace": namespace,
        "session_id": session_id,
        "wait_for": None if wait_for == "accepted" else wait_for,
        "body": body,
    }
    given = {name: value for name, value in wishes.items() if value is not None}
    wanted = StartBody.model_validate(given, by_name=True)
    key = idempotency_key or (uuid.uuid4().hex if make_key and session_id is None else None)
    return Call(
        "POST",
        "/start",
        Session.model_validate_json,
        headers=_headers(key, traceparent),
        content=wanted.model_dump_json(by_alias=True, exclude_unset=True).encode(),
        repeatable=key is not None or session_id is not None,
    )


def livekit_token(
    pool: str,
    *,
    body: Any,
    room_name: str | None,
    participant_identity: str | None,
    participant_name: str | None,
    participant_metadata: str | None,
    participant_attributes: Mapping[str, str] | None,
    idempotency_key: str | None,
    traceparent: str | None,
    make_key: bool,
) -> Call[TokenAnswer]:
    """A start in the words of LiveKit's standard token endpoint."""
    wishes: dict[str, Any] = {
        "room_name": room_name,
        "participant_identity": participant_identity,
        "participant_name": participant_name,
        "participant_metadata": participant_metadata,
        "participant_attributes": None if participant_attributes is None else dict(participant_attributes),
        "room_config": None if body is None else {"agents": [{"metadata": json.dumps(body)}]},
    }
    key = idempotency_key or (uuid.uuid4().hex if make_key and room_name is None else None)
    return Call(
        "POST",
        f"/v1/{_segment(_named(pool))}/livekit/token",
        TokenAnswer.model_validate_json,
        status=201,
        headers=_headers(key, traceparent),
        content=json.dumps({name: value for name, value in wishes.items() if value is not None}).encode(),
        repeatable=key is not None or room_name is not None,
    )


def session(pool: str, session_id: str) -> Call[SessionRecord]:
    """One session."""
    return Call("GET", _path(pool, session_id), SessionRecord.model_validate_json)


def sessions(
    pool: str,
    *,
    state: State | None,
    end_state: str | None,
    created_after: datetime | None,
    created_before: datetime | None,
    deployment_id: str | None,
    page_size: int,
    cursor: str | None = None,
) -> Call[SessionList]:
    """One page of the sessions of a pool."""
    wanted = {
        "state": state,
        "endState": end_state,
        "createdAfter": _moment("created_after", created_after),
        "createdBefore": _moment("created_before", created_before),
        "deploymentId": deployment_id,
        "limit": str(page_size),
        "cursor": cursor,
    }
    query = {name: value for name, value in wanted.items() if value is not None}
    return Call("GET", _path(pool), SessionList.model_validate_json, query=query)


def end(pool: str, session_id: str, mode: EndMode) -> Call[Terminated]:
    """The end of a session."""
    return Call("DELETE", _path(pool, session_id), Terminated.model_validate_json, query={"mode": mode})


def log(pool: str, session_id: str, tail: int) -> Call[list[LogLine]]:
    """What an agent wrote last."""
    return Call("GET", _path(pool, session_id, "logs"), _lines, query={"tail": str(tail)})


def follow_log(pool: str, session_id: str, tail: int, last_event_id: str | None) -> Call[None]:
    """What an agent writes, as events; after the line with that id, or from so many lines back."""
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    query = {"follow": "true", "tail": str(tail)}
    return Call("GET", _path(pool, session_id, "logs"), _events, query=query, headers=headers)


def session_events(pool: str, session_id: str) -> Call[None]:
    """A session's states, as events."""
    return Call("GET", _path(pool, session_id, "events"), _events)


def pool_events(pool: str) -> Call[None]:
    """What goes on in a pool, as events."""
    return Call("GET", f"/v1/agents/{_segment(_named(pool))}/events", _events)


def _events(content: bytes) -> None:
    raise ValueError("an answer that was to be a stream of events is none")


def _lines(content: bytes) -> list[LogLine]:
    return Log.model_validate_json(content).logs


def _headers(idempotency_key: str | None, traceparent: str | None) -> dict[str, str]:
    headers = {"Idempotency-Key": idempotency_key, "traceparent": traceparent}
    return {name: value for name, value in headers.items() if value is not None}


def _path(pool: str, *rest: str) -> str:
    return "/".join(("/v1/agents", _segment(_named(pool)), "sessions", *map(_segment, rest)))


def _segment(text: str) -> str:
    # A part that would be read as a step up or be left out names another thing.
    if text.strip(".") == "":
        raise ValueError(f"{text!r} is neither a pool nor a session.")
    return quote(text, safe="")


def _named(pool: str) -> str:
    # An empty one would mean the gateway's default pool, which is asked for by naming none.
    if not pool:
        raise ValueError("The pool's name is empty.")
    return pool


def _moment(name: str, moment: datetime | None) -> str | None:
    if moment is not None and moment.tzinfo is None:
        raise ValueError(f"{name} has no time zone.")
    return None if moment is None else moment.isoformat()
