"""Makes the FastAPI application of the session API."""

from __future__ import annotations

from fastapi import FastAPI

from voicepool import __version__
from voicepool.gateway import bot_routes, errors, livekit_routes, routes
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
    app.include_router(livekit_routes.router)
    app.include_router(bot_routes.router)
    app.include_router(routes.probes)
    app.add_middleware(
        BodyLimit, max_bytes=services.options.max_body_bytes, timeout_seconds=services.options.body_timeout_seconds
    )
    return app
