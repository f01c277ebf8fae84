"""Makes the FastAPI application of the session API."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from voicepool import __version__
from voicepool.gateway import (
    bot_routes,
    document,
    errors,
    first_system_routes,
    livekit_routes,
    pipecat_cloud_routes,
    routes,
    session_routes,
    stream_routes,
    web_client,
)
from voicepool.gateway.limits import BodyLimit
from voicepool.gateway.services import Services

CORS_HEADERS = ("Authorization", "Content-Type", "Idempotency-Key", "Prefer", "X-API-Key", "traceparent", "tracestate")
"""What a page may send, beside what every page may."""


def create_app(services: Services) -> FastAPI:
    """The application around the parts of a gateway."""
    app = FastAPI(
        title="voicepool",
        version=__version__,
        summary="Starts sessions with warm voice agents.",
        redoc_url=None,
        # A start's spans are the gateway's own (`tracing`); FastAPI would look at each request whether somebody wants its own, too.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.services = services
    errors.install(app)
    document.install(app, routes.SECURITY_SCHEMES)
    app.include_router(routes.router)
    app.include_router(session_routes.router)
    app.include_router(stream_routes.router)
    app.include_router(first_system_routes.router)
    app.include_router(pipecat_cloud_routes.router)
    app.include_router(livekit_routes.router)
    app.include_router(livekit_routes.webhooks)
    app.include_router(bot_routes.router)
    app.include_router(routes.probes)
    app.add_middleware(
        BodyLimit,
        max_bytes=services.options.max_body_bytes,
        max_buffered_bytes=services.options.max_buffered_bytes,
        timeout_seconds=services.options.body_timeout_seconds,
    )
    if services.options.web_client:
        web_client.mount(app)
    if services.options.cors_allow_origins:
        # Outermost, so that a page can read every answer, a 413 too. Never with credentials: a key or token is sent by the page, not by the browser.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=services.options.cors_allow_origins,
            allow_methods=bot_routes.METHODS,
            allow_headers=CORS_HEADERS,
            expose_headers=("Retry-After",),
            allow_credentials=False,
        )
    _make_routes_ready(app)
    return app


def _make_routes_ready(app: FastAPI) -> None:
    """FastAPI makes what a route needs when a request first looks for one: a tenth of a second, which no caller shall wait for."""
    for route in app.routes:
        route.matches({"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []})
