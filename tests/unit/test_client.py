"""What the client makes of an API server's bytes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from tests.unit.authority import Authority

from voicepool.kube.api import PODS, Forbidden, Resource, Unreachable, WatchEvent
from voicepool.kube.client import MAX_LOG_LINE_BYTES, AiohttpKubeApi, Connection, make_session
from voicepool.kube.convert import AGENT_PODS

POD = {
    "metadata": {"name": "one", "resourceVersion": "7", "managedFields": [{"manager": "kubelet"}]},
    "spec": {"nodeName": "n1", "containers": [{"name": "agent"}]},
    "status": {"phase": "Running"},
}
READ = {
    "metadata": {"name": "one", "resourceVersion": "7"},
    "spec": {"nodeName": "n1"},
    "status": {"phase": "Running"},
}


async def watched(resource: Resource, *chunks: bytes) -> list[WatchEvent]:
    """The events of a watch whose answer arrives in these chunks."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    async def collect(api: AiohttpKubeApi) -> list[WatchEvent]:
        return [event async for event in api.watch(resource, "calls", resource_version="1")]

    events: list[WatchEvent] = await asked(answer, collect)
    return events


async def asked(answer: Any, ask: Any) -> Any:
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app) as server, AiohttpKubeApi(ClientSession(base_url=server.make_url("/"))) as api:
        return await ask(api)


async def test_nothing_is_left_of_a_watch_that_is_left_while_the_server_is_frozen(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    open_still = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_still.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=authority.server)
    host, port = server.sockets[0].getsockname()[:2]
    connection = Connection(f"https://{host}:{port}", authority.client, lambda: None)
    async with make_session(connection) as session, session.get("/watch") as response:
        await response.content.readany()
        assert response.connection is not None
        assert response.connection.transport is not None
        socket = response.connection.transport.get_extra_info("socket")
    await asyncio.sleep(0)
    assert socket.fileno() == -1
    for writer in open_still:
        writer.transport.abort()
    server.close()


def line(kind: str, obj: Any) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


async def test_a_list_of_agent_pods_holds_only_what_is_read() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [POD]})

    def ask(resource: Resource) -> Any:
        return asked(answer, lambda api: api.list_page(resource, "calls"))

    page = await ask(AGENT_PODS)
    assert page["metadata"] == {"resourceVersion": "9", "continue": "more"}
    assert list(page["items"]) == [READ]
    assert (await ask(PODS))["items"] == [POD]


async def test_a_list_without_items_is_empty() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "9"}})

    page = await asked(answer, lambda api: api.list_page(AGENT_PODS, "calls"))
    assert page["metadata"] == {"resourceVersion": "9"}
    assert list(page["items"]) == []


async def test_a_list_with_an_item_that_is_none_is_told_as_a_broken_answer() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "9"}, "items": [POD, 7]})

    page = await asked(answer, lambda api: api.list_page(AGENT_PODS, "calls"))
    with pytest.raises(Unreachable, match="an item of a list is none"):
        list(page["items"])


@pytest.mark.parametrize(("resource", "pod"), [(PODS, POD), (AGENT_PODS, READ)])
async def test_a_watch_tells_an_event_however_its_bytes_are_cut(resource: Resource, pod: Any) -> None:
    both = line("ADDED", POD) + line("DELETED", POD)
    for cut in (1, 40, len(both) // 2, len(both) // 2 + 1, len(both) - 1):
        events = await watched(resource, both[:cut], both[cut:])
        assert events == [WatchEvent("ADDED", pod), WatchEvent("DELETED", pod)]


@pytest.mark.parametrize("resource", [PODS, AGENT_PODS])
async def test_the_error_that_ends_a_watch_is_told_whole(resource: Resource) -> None:
    status = {"kind": "Status", "code": 410, "message": "too old resource version"}
    assert await watched(resource, line("ERROR", status)) == [WatchEvent("ERROR", status)]


async def test_a_bookmark_of_agent_pods_has_its_version() -> None:
    bookmark = {
        "kind": "Pod",
        "metadata": {"resourceVersion": "12", "creationTimestamp": None},
        "spec": {"containers": None},
        "status": {},
    }
    (event,) = await watched(AGENT_PODS, line("BOOKMARK", bookmark))
    assert event.type == "BOOKMARK"
    assert event.object["metadata"] == {"resourceVersion": "12", "creationTimestamp": None}


@pytest.mark.parametrize("words", [b"nonsense\n", b'{"type": "ADDED"}\n', b'{"type": "NEVER HEARD", "object": {}}\n'])
async def test_a_watch_that_tells_nonsense_is_broken(words: bytes) -> None:
    with pytest.raises(Unreachable, match="the watch of pods broke"):
        await watched(AGENT_PODS, words)


# -- logs ----------------------------------------------------------------------------------------------------------------------


async def log_lines(*chunks: bytes, requests: list[web.Request] | None = None, **wanted: Any) -> list[bytes]:
    """The lines of a log whose answer arrives in these chunks."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if requests is not None:
            requests.append(request)
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    async def collect(api: AiohttpKubeApi) -> list[bytes]:
        async with api.pod_log("calls", "one", container="agent", follow=False, **wanted) as lines:
            return [line async for line in lines]

    found: list[bytes] = await asked(answer, collect)
    return found


async def test_a_log_is_asked_for_by_container_with_times_and_no_more_than_is_wanted() -> None:
    requests: list[web.Request] = []
    assert await log_lines(
        b"one\ntwo\n", requests=requests, tail_lines=2, limit_bytes=9, since="2026-03-01T12:00:00Z"
    ) == [
        b"one",
        b"two",
    ]
    assert requests[0].path == "/api/v1/namespaces/calls/pods/one/log"
    assert dict(requests[0].query) == {
        "container": "agent",
        "timestamps": "true",
        "tailLines": "2",
        "limitBytes": "9",
        "sinceTime": "2026-03-01T12:00:00Z",
    }


async def test_a_log_is_cut_into_lines_however_its_bytes_are_cut() -> None:
    text = b"one\n\nthree\nlast"
    for cut in range(1, len(text)):
        assert await log_lines(text[:cut], text[cut:]) == [b"one", b"", b"three", b"last"]


async def test_a_line_without_an_end_is_told_by_its_beginning_and_never_held_as_a_whole() -> None:
    long = b"x" * (3 * MAX_LOG_LINE_BYTES)
    lines = await log_lines(b"one\n", long, long, b"\ntwo\n" + long + b"\n")
    assert lines == [b"one", b"x" * MAX_LOG_LINE_BYTES, b"two", b"x" * MAX_LOG_LINE_BYTES]


async def test_a_log_that_is_refused_or_breaks_is_an_error_of_the_api() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"message": "no", "reason": "Forbidden"}, status=403)

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"one\n")
        assert request.transport is not None
        request.transport.close()
        return response

    seen: list[bytes] = []

    async def follow(api: AiohttpKubeApi) -> None:
        async with api.pod_log("calls", "one", container="agent", follow=True) as lines:
            async for line in lines:
                seen.append(line)  # noqa: PERF401 -- what came before the error counts

    with pytest.raises(Forbidden):
        await asked(refuse, follow)
    with pytest.raises(Unreachable, match="/pods/one/log"):
        await asked(break_off, follow)
    assert seen == [b"one"]


async def test_leaving_a_followed_log_closes_its_connection() -> None:
    gone = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        assert request.query["follow"] == "true"
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one\n")
        try:
            while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110 -- it has no event
                await asyncio.sleep(0.01)
        finally:
            gone.set()
        return response

    async def one_line(api: AiohttpKubeApi) -> None:
        async with api.pod_log("calls", "one", container="agent", follow=True) as lines:
            assert await anext(lines) == b"one"
        await asyncio.wait_for(gone.wait(), 10)

    await asked(endless, one_line)
