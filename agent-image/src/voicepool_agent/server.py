"""The agent's HTTP routes: probes, the bind, the end, status, metrics, and the bot's own routes below its session.

Invariants: `/readyz` is 200 only when a caller could be taken; a refused order changes nothing (the agent is as warm
as before); the bot sees no request that the gateway has not signed for this session; every answer of ours but
`/metrics` is JSON; no answer shows a token or a stack trace.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web
from loguru import logger

from voicepool_agent.assignments import MAX_ORDER_BYTES, InvalidOrder, MalformedOrder, OrderError, OrderVerifier
from voicepool_agent.bot_routes import ORDER_HEADER, REFUSED_HEADER, BotRoutes
from voicepool_agent.host import AlreadyBound, Host, NotBound, NotParked
from voicepool_agent.metrics import Metrics
from voicepool_agent.settings import Settings

MAX_WAIT_SECONDS = 60.0
CLOSE_SECONDS = 1.0
"""How long a request that is under way may keep an ended agent."""

METRICS_CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"


class Server:
    """Serves one host.

    Args:
        settings: address, port, the pod's uid.
        host: asked and told.
        verifier: checks orders.
        metrics: shown.
        bot_routes: answers below `/sessions/{id}/`.
    """

    def __init__(
        self, settings: Settings, host: Host, verifier: OrderVerifier, metrics: Metrics, bot_routes: BotRoutes
    ) -> None:
        self._settings = settings
        self._host = host
        self._verifier = verifier
        self._metrics = metrics
        self._bot_routes = bot_routes
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=MAX_ORDER_BYTES)
        application.add_routes(
            [
                web.get("/readyz", self._readyz),
                web.get("/livez", self._livez),
                web.get("/status", self._status),
                web.get("/metrics", self._show_metrics),
                web.post("/bind", self._bind),
                web.post("/end", self._end),
                web.route("*", "/sessions/{session}/{path:.*}", self._bot_route),
            ]
        )
        return application

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        self._runner = web.AppRunner(self.application(), access_log=None, shutdown_timeout=CLOSE_SECONDS)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._settings.listen_address, self._settings.port).start()

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _readyz(self, _request: web.Request) -> web.Response:
        ready = await self._host.is_ready()
        return web.json_response({"ready": ready, "state": self._host.state}, status=200 if ready else 503)

    async def _livez(self, _request: web.Request) -> web.Response:
        # That the event loop came round to answer is most of the answer.
        live = self._host.is_live
        return web.json_response({"live": live, "state": self._host.state}, status=200 if live else 503)

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": METRICS_CONTENT_TYPE})

    async def _status(self, request: web.Request) -> web.Response:
        if (wanted := request.query.get("wait")) is not None:
            if wanted != "joined":
                return _refusal(400, "MALFORMED", "only wait=joined can be waited for")
            try:
                seconds = float(request.query.get("timeout", "10"))
            except ValueError:
                return _refusal(400, "MALFORMED", "timeout must be a number of seconds")
            await self._host.wait_for_joined(min(max(seconds, 0.0), MAX_WAIT_SECONDS))
        return web.json_response(
            {
                "state": self._host.state,
                "session": self._host.session_id,
                "pod_uid": self._settings.pod_uid,
                "waiting_for": self._host.waiting_for,
                "since_seconds": round(self._host.since_seconds, 3),
            }
        )

    async def _bind(self, request: web.Request) -> web.Response:
        order = await _body(request)
        if isinstance(order, web.Response):
            return self._count(order, "TOO_LARGE")
        try:
            assignment = self._verifier.assignment(order)
            if self._host.carries(assignment.session):
                return web.json_response({"state": self._host.state, "session": assignment.session})
            self._verifier.check_unused(assignment)
            self._host.accept(assignment)
            self._verifier.use(assignment)
        except MalformedOrder as error:
            return self._refuse(400, "MALFORMED", error)
        except InvalidOrder as error:
            return self._refuse(401, "INVALID_ASSIGNMENT", error)
        except AlreadyBound as error:
            return self._refuse(409, "ALREADY_BOUND", error)
        except NotParked as error:
            return self._refuse(503, "NOT_PARKED", error)
        logger.info("accepted a session")
        return web.json_response({"state": "accepted", "session": assignment.session}, status=202)

    async def _end(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if isinstance(body, web.Response):
            return self._count(body, "TOO_LARGE")
        try:
            order = self._verifier.end(body)
            self._verifier.check_unused(order)
            self._host.end(order)
            self._verifier.use(order)
        except MalformedOrder as error:
            return self._refuse(400, "MALFORMED", error)
        except InvalidOrder as error:
            return self._refuse(401, "INVALID_ASSIGNMENT", error)
        except NotBound as error:
            return self._refuse(409, "NOT_BOUND", error)
        return web.json_response({"state": "ending", "session": order.session}, status=202)

    async def _bot_route(self, request: web.Request) -> web.StreamResponse:
        session = request.match_info["session"]
        try:
            order = self._verifier.route(request.headers.get(ORDER_HEADER, "").encode())
            self._verifier.check_unused(order)
            self._verifier.use(order)
        except OrderError as error:
            return _not_the_bot(self._refuse(401, "INVALID_ASSIGNMENT", error), "INVALID_ASSIGNMENT")
        if order.session != session or self._host.session_id != session:
            words = f"this agent does not carry session {session[:64]!r}"
            return _not_the_bot(_refusal(404, "SESSION_NOT_FOUND", words), "SESSION_NOT_FOUND")
        try:
            answer = await self._bot_routes.answer(request, "/" + request.match_info["path"])
        except web.HTTPRequestEntityTooLarge:
            words = f"a body may have at most {MAX_ORDER_BYTES} bytes"
            return _not_the_bot(_refusal(413, "BODY_TOO_LARGE", words), "BODY_TOO_LARGE")
        if answer is None:
            words = "the bot has no routes of its own, or the path is reserved"
            return _not_the_bot(_refusal(404, "NOT_FOUND", words), "NOT_FOUND")
        return answer

    def _refuse(self, status: int, code: str, error: Exception) -> web.Response:
        logger.bind(code=code).warning(f"refused an order: {error}")
        return self._count(_refusal(status, code, str(error)), code)

    def _count(self, response: web.Response, code: str) -> web.Response:
        self._metrics.refused_orders.labels(code).inc()
        return response


def _not_the_bot(response: web.Response, code: str) -> web.Response:
    response.headers[REFUSED_HEADER] = code
    return response


async def _body(request: web.Request) -> bytes | web.Response:
    try:
        return (await request.read()).strip()
    except web.HTTPRequestEntityTooLarge:
        return _refusal(413, "TOO_LARGE", f"an order may have at most {MAX_ORDER_BYTES} bytes")


def _refusal(status: int, code: str, words: str) -> web.Response:
    answer: dict[str, Any] = {"error": words, "code": code}
    return web.json_response(answer, status=status)
