"""What goes over the wire of the session API: the gateway writes these models, the client reads them (and the other way round for :class:`StartBody`).

Invariants: nothing but pydantic is needed to import it; names are snake_case here and the wire's own spelling there; a reader leaves out what it does not know
and takes any word where the API has a few today, so that a client goes on working with a gateway that is newer.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer
from pydantic.alias_generators import to_camel

SESSION_ID_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
"""What Kubernetes takes as the value of a label."""


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Moment = Annotated[AwareDatetime, PlainSerializer(_rfc3339, when_used="json")]
"""RFC 3339 in UTC with microseconds."""


class CamelCase(BaseModel):
    """Spelt ``likeThis`` on the wire."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="ignore")


class StartBody(CamelCase):
    """What a caller sends to start a session. Fields of other systems' clients are accepted and ignored."""

    # Read by the wire's spelling alone: what another system's client may mean by `session_id` is not known.
    model_config = ConfigDict(validate_by_name=False)

    pool: str | None = Field(None, max_length=317)
    """The pool, as `name` or `namespace.name`."""
    pools: list[Annotated[str, Field(min_length=1, max_length=317)]] | None = Field(None, min_length=1, max_length=10)
    """Pools that will do, the best first, in place of one."""
    selector: str | dict[str, str] | None = Field(None, max_length=1024)
    """The labels of pools that will do, in place of their names: a map, or a string as `kubectl -l` takes it."""
    namespace: str | None = Field(None, max_length=63)
    """Of the pools that `selector` is about; the default one if it is left out."""
    agent_name: str | None = Field(None, max_length=317)
    """The pool, as Pipecat Cloud's clients send it."""
    transport: Literal["livekit"] | None = None
    session_id: str | None = Field(None, pattern=SESSION_ID_PATTERN)
    """Chosen by the caller; the same one again gets the same agent."""
    wait_for: Literal["accepted", "joined"] | None = None
    body: Any = None
    """Handed to the bot as it is."""


class StartedAgent(CamelCase):
    """The agent that took a session."""

    pod: str
    namespace: str
    pool: str


class Session(CamelCase):
    """A session that has its agent, and where its caller finds it."""

    session_id: str
    url: str
    """Of the LiveKit server, for the caller."""
    token: str = Field(repr=False)
    """Lets one caller into the room; good for minutes, for the first connect only."""
    room_name: str
    state: str
    """``accepted``; ``joined`` where the caller waited for that; ``unknown`` where the agent did not say."""
    cold_start: bool
    """The agent was started for this caller."""
    bot_start_seconds: float
    """From the request to the agent's word."""
    agent: StartedAgent

    @property
    def pool(self) -> str:
        """The pool, as each call takes it: ``namespace.name``."""
        return f"{self.agent.namespace}.{self.agent.pool}"


class RecordedAgent(CamelCase):
    """The agent of a session, as its pod shows it."""

    pod: str
    node: str | None
    template: str
    """The hash of the pool's template from which it was made."""


class SessionRecord(CamelCase):
    """What is known of a session, in Pipecat Cloud's words where it has some."""

    session_id: str
    namespace: str
    pool: str
    state: str
    """``bound``, ``accepted``, ``joined``, ``ending`` or ``ended``. Lists, which are made from pods alone, do not know ``accepted`` and ``joined``."""
    room_name: str | None
    created_at: Moment | None
    ended_at: Moment | None
    cold_start: bool
    bot_start_seconds: float | None
    """How long its caller waited for the bind."""
    deployment_id: str
    """The hash of the pool's template from which the agent was made."""
    end_state: str
    """``active``, ``completed``, ``terminated``, ``agent_start_timeout``, ``agent_error`` or ``unknown``."""
    completion_status: str | None
    """Of a session that ended: ``completed``; ``failed`` where its agent, a provider or LiveKit failed; ``dropped`` where its agent left no word."""
    reason: str | None
    """Why it ended."""
    agent: RecordedAgent
    summary: dict[str, Any] | None
    """What the agent wrote down at its end."""


class SessionList(BaseModel):
    """A page of the sessions of a pool."""

    total_count: int
    """On all pages."""
    sessions: list[SessionRecord]
    next_cursor: str | None = Field(validation_alias="nextCursor", serialization_alias="nextCursor")
    """Leads to the next page; null on the last one."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)


class Terminated(BaseModel):
    """A session that ends or has ended."""

    status: str
    """``terminated`` or ``draining``."""
    session_id: str


class LogLine(BaseModel):
    """One line that an agent has written."""

    timestamp: str
    """RFC 3339, as the node wrote it, often with nanoseconds; empty where it did not."""
    log: str


class Log(BaseModel):
    """What an agent has written last."""

    logs: list[LogLine]


class EndOfLog(CamelCase):
    """The session's container has ended; nothing comes after this."""

    session_id: str


class PoolCounts(BaseModel):
    """How many pods of a pool are how."""

    namespace: str
    pool: str
    warm: int
    starting: int
    bound: int
    ended: int


class TokenAnswer(BaseModel):
    """What LiveKit's `TokenSource.endpoint` expects, and no more: some SDKs refuse a field that they do not know."""

    server_url: str
    participant_token: str = Field(repr=False)


class ErrorAnswer(BaseModel):
    """The one shape of an error. Pipecat Cloud's clients read the first two, the JavaScript client the others."""

    error: str
    """What went wrong, in two or three words."""
    code: str
    """The same for programs."""
    detail: str
    """What, where, and what to do."""
    info: str
    """The same as ``detail``."""
