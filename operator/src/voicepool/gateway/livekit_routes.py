"""The routes that LiveKit's own programs call: the token endpoint of its client SDKs, and the webhook of its server."""

from __future__ import annotations

import functools
import json
import re
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from voicepool.gateway.document import OF_A_START, OF_A_WEBHOOK
from voicepool.gateway.errors import BadRequest, Unauthenticated
from voicepool.gateway.livekit import LiveKitServer, agent_identity, caller_token
from voicepool.gateway.requests import StartRequest
from voicepool.gateway.routes import Injected, KeyFirst, parts_of_start
from voicepool.gateway.starting import IdempotencyKey, Traceparent, begin, choose
from voicepool.gateway.view import PoolKey
from voicepool.session_api import StartBody, TokenAnswer

_ROOM_SESSIONS = uuid.UUID("d1f0a3c2-58a1-5e0f-8a55-0f7f5c8e6b42")
"""Namespace of the session ids that are derived from a caller's name of a room; any constant would do."""
_MAX_TOKEN_CHARACTERS = 4096
"""Of metadata, and of attributes: the token goes into the URL of a WebSocket, which servers and proxies limit."""
_RESERVED = ("sip.", "lk.")

router = APIRouter(tags=["livekit"], route_class=KeyFirst)
webhooks = APIRouter(tags=["livekit"])


def _either(snake_case: str) -> Any:
    """LiveKit's SDKs send snake case; protobuf's JSON is camel case as well."""
    first, *rest = snake_case.split("_")
    return AliasChoices(snake_case, first + "".join(map(str.capitalize, rest)))


class AgentDispatch(BaseModel):
    """The agent that a client asks for."""

    model_config = ConfigDict(extra="ignore")

    agent_name: str = Field("", validation_alias=_either("agent_name"), max_length=317)
    """The pool of the path, or nothing."""
    metadata: str = Field("", max_length=65536)
    """Given to the bot as its `body`: as JSON if it is, else as it stands."""


class RoomConfiguration(BaseModel):
    """Of LiveKit's room configuration, what a client may set: its agent."""

    model_config = ConfigDict(extra="allow")

    agents: list[AgentDispatch] = Field([], max_length=1)

    @model_validator(mode="after")
    def _nothing_else(self) -> RoomConfiguration:
        # Recordings, time-outs and limits of a room are not for a caller to choose. SDKs may write out what is not set.
        if chosen := sorted(
            re.sub(r"[^\w]", "?", name)[:64] for name, value in (self.model_extra or {}).items() if value
        ):
            raise ValueError(f"only 'agents' can be set here, not {', '.join(chosen)}")
        return self


class TokenRequest(BaseModel):
    """What LiveKit's `TokenSource.endpoint` sends."""

    model_config = ConfigDict(extra="ignore")

    room_name: str | None = Field(None, validation_alias=_either("room_name"), max_length=256)
    """The caller's own name of a session: the same one again gets the same agent. It is not the name of the room."""
    participant_name: str | None = Field(None, validation_alias=_either("participant_name"), max_length=256)
    participant_identity: str | None = Field(None, validation_alias=_either("participant_identity"), max_length=256)
    participant_metadata: str | None = Field(
        None, validation_alias=_either("participant_metadata"), max_length=_MAX_TOKEN_CHARACTERS
    )
    participant_attributes: dict[str, str] | None = Field(
        None, validation_alias=_either("participant_attributes"), max_length=64
    )
    room_config: RoomConfiguration | None = Field(None, validation_alias=_either("room_config"))

    @field_validator("participant_attributes")
    @classmethod
    def _bounded(cls, attributes: dict[str, str] | None) -> dict[str, str] | None:
        attributes = attributes or {}
        if sum(len(name) + len(value) for name, value in attributes.items()) > _MAX_TOKEN_CHARACTERS:
            raise ValueError(f"all names and values together have more than {_MAX_TOKEN_CHARACTERS} characters")
        if any(name.startswith(_RESERVED) for name in attributes):
            # A bot takes sip.phoneNumber for the telephone network's word.
            raise ValueError("names that begin with 'sip.' or 'lk.' are LiveKit's own")
        return attributes

    @property
    def agent(self) -> AgentDispatch:
        """The agent that is asked for."""
        return self.room_config.agents[0] if self.room_config and self.room_config.agents else AgentDispatch()


class Heard(BaseModel):
    """What came of a webhook."""

    outcome: Literal["started", "ignored"]


@router.post("/v1/{pool}/livekit/token", status_code=201, responses=OF_A_START)
async def token(
    request: Request,
    pool: str,
    body: TokenRequest | None = None,
    idempotency_key: IdempotencyKey = "",
    traceparent: Traceparent = "",
) -> TokenAnswer:
    """Start a session with a warm agent of this pool, in the words of LiveKit's standard token endpoint."""
    services, caller = await parts_of_start(request)
    body = body or TokenRequest()
    choice = await choose(services, caller, StartBody(), pool)
    key = (choice.namespace, choice.pools[0])
    _require_agent_of(key, pool, body.agent.agent_name)
    session_id = choice.session_id(caller, idempotency_key)
    if body.room_name:
        session_id = str(uuid.uuid5(_ROOM_SESSIONS, "\0".join((caller.name, *key, body.room_name))))
    if body.participant_identity == agent_identity(session_id):
        raise BadRequest("This participant_identity is the agent's own, which would be thrown out; take another one.")

    @functools.cache
    def participant_token(server: LiveKitServer, room: str) -> str:
        return caller_token(
            server,
            room=room,
            identity=body.participant_identity or f"caller-{uuid.uuid4()}",
            ttl_seconds=services.options.caller_token_seconds,
            name=body.participant_name or "",
            metadata=body.participant_metadata or "",
            attributes=body.participant_attributes or {},
        )

    with services.tracing.request(request.scope["route"].path, traceparent or None) as span:
        span.note(pool=f"{key[0]}/{key[1]}")
        wanted = StartRequest(
            namespace=key[0],
            pool=key[1],
            session_id=session_id,
            keyed=bool(body.room_name or idempotency_key),
            body=_body(body.agent.metadata),
            caller=caller.mark,
            span=span,
            beside=participant_token,
        )
        started = await begin(request, services, caller, wanted)
    return TokenAnswer(
        server_url=started.server.caller_url, participant_token=participant_token(started.server, started.room)
    )


@webhooks.post("/livekit/webhook", responses=OF_A_WEBHOOK)
async def webhook(request: Request, services: Injected, authorization: Annotated[str | None, Header()] = None) -> Heard:
    """For LiveKit's server: who joins a room that has a pool's inbound prefix gets an agent. The signature is the authentication."""
    if not authorization:
        raise Unauthenticated("LiveKit's webhooks carry a signature in 'Authorization'.", code="INVALID_WEBHOOK")
    # LiveKit sends it again.
    services.require_synced()
    verified = await services.inbound.verified(await request.body(), authorization.removeprefix("Bearer "))
    return Heard(outcome=await services.inbound.heard(verified))


def _require_agent_of(key: PoolKey, pool: str, agent_name: str) -> None:
    if agent_name not in ("", pool, key[1], ".".join(key)):
        raise BadRequest(
            f"The agent_name in room_config is not the pool of this address, {key[0]}/{key[1]}; "
            "leave it out, or ask at /v1/<that pool>/livekit/token."
        )


def _body(metadata: str) -> Any:
    if not metadata:
        return None
    try:
        return json.loads(metadata)
    except (ValueError, RecursionError):
        return metadata
