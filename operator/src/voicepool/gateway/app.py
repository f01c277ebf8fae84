"""Makes the FastAPI application of the session API."""

from __future__ import annotations

from fastapi import FastAPI

from voicepool import __version__
from voicepool.gateway import (
    bot_routes,
    errors,
    first_system_routes,
    pipecat_cloud_routes,
    routes,
    session_routes,
    stream_routes,
    web_client,
)
from voicepool.gateway.limits import BodyLimit
from voicepool.gateway.services import Services


def create_app(services: Services) -> FastAPI:
    """The application around the parts of a gateway."""
    app = FastAPI(
        title="voicepool", version=__version__, summary="Starts sessions with warm voice agents.", redoc_url=None
    )
    app.state.services = services
    errors.install(app)
    app.include_router(routes.router)
    app.include_router(session_routes.router)
    app.include_router(stream_routes.router)
    app.include_router(first_system_routes.router)
    app.include_router(pipecat_cloud_routes.router)
    app.include_router(bot_routes.router)
    app.include_router(routes.probes)
    app.add_middleware(
        BodyLimit, max_bytes=services.options.max_body_bytes, timeout_seconds=services.options.body_timeout_seconds
    )
    if services.options.web_client:
        web_client.mount(app)
    return app
