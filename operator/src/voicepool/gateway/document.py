"""What the OpenAPI document says beside what FastAPI reads from the routes: which errors a route answers with, and how.

A client that is made from the document finds in it every status that can come, with the shape of its body.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.security.base import SecurityBase

from voicepool.gateway import errors
from voicepool.gateway.errors import GatewayError
from voicepool.session_api import ErrorAnswer

Answers = dict[int | str, dict[str, Any]]
"""By status, as FastAPI takes them."""
Kinds = tuple[type[GatewayError], ...]

_WITH_KEY: Kinds = (
    errors.BadRequest,
    errors.Unauthenticated,
    errors.BodyTimeout,
    errors.BodyTooLarge,
    errors.TooManyBodies,
    errors.TooManyFailures,
    errors.IssuerUnavailable,
    errors.ClusterUnavailable,
)
_OF_POOLS: Kinds = (*_WITH_KEY, errors.NotAllowed, errors.NotSynced)
_OF_A_POOL: Kinds = (*_OF_POOLS, errors.PoolNotFound)
_OF_A_SESSION: Kinds = (*_OF_A_POOL, errors.SessionNotFound)
_OF_A_START: Kinds = (
    *_OF_A_POOL,
    errors.SessionEnded,
    errors.SessionElsewhere,
    errors.RateLimited,
    errors.QuotaExceeded,
    errors.PoolAtCapacity,
    errors.QueueFull,
    errors.NoWarmAgent,
    errors.AgentsRefused,
    errors.LiveKitUnavailable,
    errors.DeadlinePassed,
    errors.NotJoined,
)


def declared(*kinds: type[GatewayError]) -> Answers:
    """The answers of a route that can end in these errors."""
    by_status: dict[int, list[type[GatewayError]]] = defaultdict(list)
    for kind in dict.fromkeys(kinds):
        for status in (kind.status, *kind.other_statuses):
            by_status[status].append(kind)
    return {status: _answer(status, by_status[status]) for status in sorted(by_status)}


def _answer(status: int, kinds: list[type[GatewayError]]) -> dict[str, Any]:
    said = "; ".join(f"{kind.error} ({', '.join((kind.code, *kind.other_codes))})" for kind in kinds)
    # By its name: as a model of each route it would be made ready to check answers with, before the first request and dozens of times.
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}}
    answer: dict[str, Any] = {"description": said, "content": content}
    if status in errors.TRY_AGAIN:
        seconds = {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}
        answer["headers"] = {"Retry-After": seconds}
    if status == 401:
        answer["headers"] = {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}}
    return answer


STARTING = declared(errors.NotSynced)
"""Of a route for everybody that needs to know the cluster."""
WITH_KEY = declared(*_WITH_KEY)
"""Of a route that needs a key, and nothing that the key is for."""
OF_POOLS = declared(*_OF_POOLS)
OF_A_POOL = declared(*_OF_A_POOL)
OF_A_SESSION = declared(*_OF_A_SESSION)
OF_AN_END = declared(*_OF_A_SESSION, errors.AgentUnreachable)
OF_A_START = declared(*_OF_A_START)
OF_A_WEBHOOK = declared(
    errors.BadRequest,
    errors.Unauthenticated,
    errors.BodyTimeout,
    errors.BodyTooLarge,
    errors.TooManyBodies,
    errors.ClusterUnavailable,
    errors.LiveKitUnavailable,
    errors.NotSynced,
)
STREAM = declared(errors.TooManyStreams)
"""Of what is followed, beside what its route has anyway."""


def events(*names: str) -> Answers:
    """An answer that is a stream of server-sent events of these names, as OpenAPI says it of the items of a stream."""
    item = {
        "type": "object",
        "required": ["event", "data"],
        "properties": {
            "event": {"enum": list(names)},
            "data": {"type": "string", "contentMediaType": "application/json"},
            "id": {"type": "string"},
        },
    }
    return {200: {"content": {"text/event-stream": {"itemSchema": item}}}}


OF_A_BOT: Answers = {
    "default": {
        "description": "Whatever the bot answers, of any status and type; or an error of the gateway, which has `error`, `code`, `detail` and `info`."
    }
}


def merged(*answers: Answers) -> Answers:
    """The answers of a route that is several things; of one status, those of all."""
    both: Answers = {}
    for one in answers:
        for status, answer in one.items():
            known = both.get(status, {})
            descriptions = [words for words in (known.get("description"), answer.get("description")) if words]
            both[status] = known | answer | ({"description": "; ".join(descriptions)} if descriptions else {})
    return both


def install(app: FastAPI, security_schemes: Iterable[SecurityBase]) -> None:
    """Have the application serve the document of what it does: of FastAPI's own answer to a request that is not valid there is nothing here, that is a 400."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            schemas = made["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            schemas[ErrorAnswer.__name__] = ErrorAnswer.model_json_schema()
            made["components"]["securitySchemes"] = {
                scheme.scheme_name: scheme.model.model_dump(mode="json", by_alias=True, exclude_none=True)
                for scheme in security_schemes
            }
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
