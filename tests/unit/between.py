"""What stands between a client and a gateway: sees the requests, and loses, cuts and makes up answers as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from urllib.parse import urlsplit


class Between:
    """A proxy on a port of its own.

    Args:
        gateway: the address to which requests go.
    """

    def __init__(self, gateway: str) -> None:
        self._gateway = urlsplit(gateway)
        self.address = ""
        self.requests: list[str] = []
        """Their heads, as they came."""
        self.answers: list[bytes] = []
        """Given to the next requests, which then go no further; empty ones are the end of the connection."""
        self.lose = 0
        """So many answers of the gateway get lost."""
        self.cut_after: bytes | None = None
        """The next answer breaks off when this has come."""
        self._open: set[asyncio.Task[None]] = set()

    def sent(self, header: str) -> list[str | None]:
        """A header of each request."""
        found = (re.search(rf"^{header}: (.*)\r$", head, re.IGNORECASE | re.MULTILINE) for head in self.requests)
        return [match[1] if match else None for match in found]

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def close(self) -> None:
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"^content-length: (\d+)\r$", head, re.IGNORECASE | re.MULTILINE)
                body = await reader.readexactly(int(length[1]) if length else 0)
                self.requests.append(head.decode())
                if not self.answers:
                    break
                answer = self.answers.pop(0)
                if not answer:
                    return
                writer.write(answer)
            forwarding = asyncio.ensure_future(self._forward(head[:-2] + b"Connection: close\r\n\r\n" + body, writer))
            # Nothing more is asked on this connection: what can be read from it is its end.
            hung_up = asyncio.ensure_future(reader.read())
            try:
                await asyncio.wait({forwarding, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (forwarding, hung_up):
                    task.cancel()
                await asyncio.gather(forwarding, hung_up, return_exceptions=True)

    async def _forward(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        assert self._gateway.port is not None
        from_gateway, to_gateway = await asyncio.open_connection(self._gateway.hostname, self._gateway.port)
        with contextlib.closing(to_gateway):
            to_gateway.write(request)
            if self.lose:
                self.lose -= 1
                await from_gateway.readuntil(b"\r\n\r\n")
                return
            seen = b""
            while part := await from_gateway.read(65536):
                writer.write(part)
                await writer.drain()
                seen += part
                if self.cut_after and self.cut_after in seen:
                    self.cut_after = None
                    return


@contextlib.asynccontextmanager
async def between(gateway: str) -> AsyncIterator[Between]:
    """A proxy before the gateway at this address."""
    made = Between(gateway)
    server = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    made.address = f"http://{host}:{port}"
    try:
        yield made
    finally:
        server.close()
        await made.close()
        await server.wait_closed()


def refusal(status: int, code: str, *, retry_after_seconds: int | None = None) -> bytes:
    """An error as a gateway sends it."""
    body = f'{{"error": "No", "code": "{code}", "detail": "In words.", "info": "In words."}}'
    headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    if retry_after_seconds is not None:
        headers += f"Retry-After: {retry_after_seconds}\r\n"
    return f"HTTP/1.1 {status} No\r\n{headers}\r\n{body}".encode()


def page(status: int, text: str, kind: str = "text/html") -> bytes:
    """What another server says."""
    return f"HTTP/1.1 {status} Some\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
