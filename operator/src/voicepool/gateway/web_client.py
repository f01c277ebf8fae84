"""Pipecat's prebuilt web client at ``/client/``: a page to talk to an agent from a browser, for trying things.

The page calls ``POST /start`` of its own origin with ``{"transport": "livekit"}`` and knows nothing of API keys. So the browser is asked for one, as it is for
every page with a password: a call of that page that is refused is answered with a challenge for HTTP Basic, and the password that comes back counts as
the API key.

Invariants: a password counts only in a call that the browser itself says to be of this origin (``Sec-Fetch-Site``, which no script can set), or any other page
could start sessions with what the browser remembers; no other call sees a difference.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepool.settings import SettingsError

PATH = "/client"
START = "/start"
CHALLENGE = 'Basic realm="voicepool: any name, and an API key as the password", charset="UTF-8"'


def mount(app: FastAPI) -> None:
    """Serve the page.

    Raises:
        SettingsError: the package with the page is not installed.
    """
    try:
        # It prints where it looks for its files.
        with contextlib.redirect_stdout(io.StringIO()):
            from pipecat_ai_prebuilt.frontend import PipecatPrebuiltUI
    except (ImportError, RuntimeError) as error:
        raise SettingsError(
            f"VOICEPOOL_WEB_CLIENT: the package pipecat-ai-prebuilt, which has the page, cannot be used ({error}). "
            "Add it to the image (pip install --no-deps pipecat-ai-prebuilt), or switch the setting off."
        ) from None

    @app.get(PATH, include_in_schema=False)
    async def with_slash() -> RedirectResponse:
        # The page names its files relative to its own address.
        return RedirectResponse(f"{PATH}/")

    app.mount(PATH, PipecatPrebuiltUI)
    app.add_middleware(BrowserKeys)


class BrowserKeys:
    """Lets a browser send the API key of its user in the page's call of ``/start``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"] != START:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("sec-fetch-site") != "same-origin":
            await self._app(scope, receive, send)
            return
        key = _password(headers.get("authorization", ""))
        if key is not None:
            scope = {**scope, "headers": [*scope["headers"], (b"x-api-key", key)]}

        async def challenge(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 401:
                MutableHeaders(scope=message)["WWW-Authenticate"] = CHALLENGE
            await send(message)

        await self._app(scope, receive, challenge)


def _password(authorization: str) -> bytes | None:
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        _, found, password = base64.b64decode(credentials, validate=True).partition(b":")
    except (ValueError, binascii.Error):
        return None
    return password if found else None
