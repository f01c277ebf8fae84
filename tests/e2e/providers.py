"""Doubles of AssemblyAI, Groq and Inworld, on one port.

As much of their protocols as Pipecat's services use. They check the key, count connections, and remember what they were
asked, so that a test can say that a parked agent has opened none, and that the caller's audio and the agent's prompt
have arrived. What a provider says is fixed by the test. Latency is added where the real ones have it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

SAMPLES_PER_SECOND_OF_ASSEMBLYAI = 16_000
SECONDS_PER_CHARACTER = 0.05


class Fault(StrEnum):
    """What can be wrong with a provider, from the moment on that a test says so."""

    REFUSES = "refuses"
    """The key is no longer good: open connections are closed, new ones get 401."""
    SILENT = "silent"
    """It takes everything and answers nothing."""
    CLOSES = "closes"
    """The connection breaks in the middle of each answer; the next one can be made."""
    BABBLES = "babbles"
    """What comes in the place of answers cannot be read; `babble` is in it."""
    ERRS = "errs"
    """It answers with its own kind of error, and quotes `babble` in it."""


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function that Groq's double wants to be called, in the place of an answer."""

    name: str
    arguments: dict[str, Any]


@dataclass
class Providers:
    """The three doubles; use as an asynchronous context manager.

    Attributes:
        hears: what AssemblyAI understands of everything that is said.
        answers: what Groq says to everything.
        calls: the functions that Groq calls before, one for each thing that the caller says, if they are offered.
        latency_seconds: before each accepts a connection or begins to answer.
        faults: by provider; may be changed in the middle of a call.
        babble: what a provider that babbles says, and what one that errs quotes.
        host: the address of this machine where they listen.
    """

    key: str = "a-key-for-the-doubles"
    hears: str = "hello there how are you"
    answers: str = "Thank you for asking, I am a warm agent."
    calls: list[FunctionCall] = field(default_factory=list)
    latency_seconds: float = 0.0
    faults: dict[str, Fault] = field(default_factory=dict)
    babble: str = "colourless green ideas"
    host: str = "127.0.0.1"

    connections: dict[str, int] = field(default_factory=lambda: {"assemblyai": 0, "groq": 0, "inworld": 0})
    """Connections or requests ever, by provider."""
    refused: dict[str, int] = field(default_factory=lambda: {"assemblyai": 0, "groq": 0, "inworld": 0})
    """Those with a wrong key."""
    heard_seconds: float = 0.0
    """Audio that AssemblyAI got."""
    prompts: list[list[dict[str, Any]]] = field(default_factory=list)
    """The messages of each request to Groq."""
    offered: list[set[str]] = field(default_factory=list)
    """The functions of each request to Groq."""
    spoken: list[str] = field(default_factory=list)
    """The texts that Inworld was given."""
    gone_wrong: dict[str, int] = field(default_factory=lambda: {"assemblyai": 0, "groq": 0, "inworld": 0})
    """How often a fault took its course, by provider; refused keys are counted in `refused`."""
    open: dict[str, list[web.WebSocketResponse]] = field(default_factory=lambda: {"assemblyai": [], "inworld": []})
    """WebSocket connections at this moment, by provider."""

    _runner: web.AppRunner | None = None
    _address: str = ""

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_get("/assemblyai/v3/ws", self._checked("assemblyai", self._assemblyai))
        application.router.add_post("/groq/openai/v1/chat/completions", self._checked("groq", self._groq))
        application.router.add_get("/inworld/ws", self._checked("inworld", self._inworld))
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self._address = f"{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def hang_up(self, provider: str) -> None:
        """Close the connections to one of them, as a provider does that wants no idle ones."""
        for socket in self.open[provider]:
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER, message=b"idle for too long")

    @property
    def environment(self) -> dict[str, str]:
        """What points the reference bot at the doubles."""
        return {
            "ASSEMBLYAI_API_KEY": self.key,
            "ASSEMBLYAI_URL": f"ws://{self._address}/assemblyai/v3/ws",
            "GROQ_API_KEY": self.key,
            "GROQ_URL": f"http://{self._address}/groq/openai/v1",
            "INWORLD_API_KEY": self.key,
            "INWORLD_URL": f"ws://{self._address}/inworld/ws",
        }

    def _checked(
        self, provider: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def checked(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(self.latency_seconds)
            # "<key>" (AssemblyAI), "Bearer <key>" (Groq), "Basic <key>" (Inworld)
            right = request.headers.get("Authorization", "").split(" ")[-1] == self.key
            if not right or self.faults.get(provider) is Fault.REFUSES:
                self.refused[provider] += 1
                return web.json_response(
                    {"error": {"message": "invalid API key", "code": "invalid_api_key"}}, status=401
                )
            self.connections[provider] += 1
            return await handler(request)

        return checked

    @contextlib.asynccontextmanager
    async def _socket(self, provider: str, request: web.Request) -> AsyncIterator[web.WebSocketResponse]:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.open[provider].append(socket)
        try:
            yield socket
        finally:
            self.open[provider].remove(socket)

    async def _assemblyai(self, request: web.Request) -> web.StreamResponse:
        async with self._socket("assemblyai", request) as socket:
            await self._recognise(socket)
        return socket

    async def _recognise(self, socket: web.WebSocketResponse) -> None:
        if self.faults.get("assemblyai") is not Fault.SILENT:
            await socket.send_json({"type": "Begin", "id": "double", "expires_at": int(time.time()) + 3600})
        turn = 0
        received = 0
        async for message in socket:
            if await self._goes_wrong("assemblyai", socket, {"type": "Error", "error": self.babble}):
                continue
            if message.type is WSMsgType.BINARY:
                received += len(message.data)
                self.heard_seconds += len(message.data) / 2 / SAMPLES_PER_SECOND_OF_ASSEMBLYAI
            elif message.type is WSMsgType.TEXT:
                kind = json.loads(message.data)["type"]
                if kind == "ForceEndpoint":
                    await socket.send_json(self._turn(turn))
                    turn += 1
                elif kind == "Terminate":
                    seconds = received / 2 / SAMPLES_PER_SECOND_OF_ASSEMBLYAI
                    await socket.send_json(
                        {"type": "Termination", "audio_duration_seconds": seconds, "session_duration_seconds": seconds}
                    )

    def _turn(self, order: int) -> dict[str, Any]:
        words = [
            {"start": 100 * index, "end": 100 * index + 90, "text": word, "confidence": 0.9, "word_is_final": True}
            for index, word in enumerate(self.hears.split())
        ]
        return {
            "type": "Turn",
            "turn_order": order,
            "turn_is_formatted": True,
            "end_of_turn": True,
            "transcript": self.hears,
            "end_of_turn_confidence": 0.9,
            "words": words,
        }

    async def _groq(self, request: web.Request) -> web.StreamResponse:
        question = await request.json()
        self.prompts.append(question["messages"])
        self.offered.append({tool["function"]["name"] for tool in question.get("tools") or ()})
        fault = self.faults.get("groq")
        self.gone_wrong["groq"] += fault is not None
        if fault is Fault.ERRS:
            error = {"message": "Failed to call a function.", "failed_generation": self.babble}
            return web.json_response({"error": error}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if fault is Fault.SILENT:
            while request.transport is not None:  # noqa: ASYNC110 - until whoever asked has given up
                await asyncio.sleep(0.05)
            return response
        await response.prepare(request)

        def event(delta: dict[str, Any], finish: str | None, **more: Any) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            chunk = {"id": "double", "object": "chat.completion.chunk", "created": 1, "model": question["model"]}
            return f"data: {json.dumps({**chunk, 'choices': [choice], **more})}\n\n".encode()

        calls_now = (
            bool(self.calls) and self.calls[0].name in self.offered[-1] and question["messages"][-1]["role"] == "user"
        )
        if calls_now:
            call = self.calls.pop(0)
            function = {"name": call.name, "arguments": json.dumps(call.arguments)}
            one = {"index": 0, "id": f"call-{len(self.prompts)}", "type": "function", "function": function}
            await response.write(event({"role": "assistant", "tool_calls": [one]}, None))
        for word in () if calls_now else self.answers.split():
            if fault is Fault.BABBLES:
                await response.write(f"data: {self.babble}\n\n".encode())
                continue
            await response.write(event({"role": "assistant", "content": word + " "}, None))
            if fault is Fault.CLOSES and request.transport is not None:
                request.transport.abort()
                return response
        usage = {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18}
        await response.write(event({}, "tool_calls" if calls_now else "stop", usage=usage))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _inworld(self, request: web.Request) -> web.StreamResponse:
        async with self._socket("inworld", request) as socket:
            await self._synthesise(socket)
        return socket

    async def _synthesise(self, socket: web.WebSocketResponse) -> None:
        rates: dict[str, int] = {}
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            error = {"result": {"status": {"code": 3, "message": self.babble}}}
            if await self._goes_wrong("inworld", socket, error):
                continue
            order = json.loads(message.data)
            context = order.get("contextId", "")
            if "create" in order:
                rates[context] = order["create"]["audioConfig"]["sampleRateHertz"]
                await socket.send_json({"result": {"contextId": context, "contextCreated": {}}})
            elif "send_text" in order:
                await self._speak(socket, context, order["send_text"]["text"], rates.get(context))
            elif "close_context" in order:
                await socket.send_json({"result": {"contextId": context, "contextClosed": {}}})

    async def _goes_wrong(self, provider: str, socket: web.WebSocketResponse, error: dict[str, Any]) -> bool:
        """Whether the provider has a fault, which takes its course."""
        fault = self.faults.get(provider)
        self.gone_wrong[provider] += fault is not None
        if fault is Fault.BABBLES:
            await socket.send_str(self.babble)
        elif fault is Fault.ERRS:
            await socket.send_json(error)
        elif fault is Fault.REFUSES:
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"the key is no longer valid")
        elif fault is Fault.CLOSES:
            await socket.close(code=WSCloseCode.INTERNAL_ERROR)
        return fault is not None

    async def _speak(self, socket: web.WebSocketResponse, context: str, text: str, rate: int | None) -> None:
        if not text.strip() or rate is None:
            return
        self.spoken.append(text)
        seconds = SECONDS_PER_CHARACTER * len(text)
        words = text.split()
        each = seconds / len(words)
        timestamps = {
            "wordAlignment": {
                "words": words,
                "wordStartTimeSeconds": [each * index for index in range(len(words))],
                "wordEndTimeSeconds": [each * (index + 1) for index in range(len(words))],
            }
        }
        audio = _tone(seconds, rate)
        for start in range(0, len(audio), 9600):
            content = base64.b64encode(audio[start : start + 9600]).decode()
            chunk: dict[str, Any] = {"audioContent": content}
            if start == 0:
                chunk["timestampInfo"] = timestamps
            await socket.send_json({"result": {"contextId": context, "audioChunk": chunk}})
        await socket.send_json({"result": {"contextId": context, "flushCompleted": {}}})


def _tone(seconds: float, rate: int) -> bytes:
    samples = 6000 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)
    return samples.astype(np.int16).tobytes()
