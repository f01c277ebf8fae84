"""What the client makes of an API server's bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from voicepool.kube.api import PODS, Resource, Unreachable, WatchEvent
from voicepool.kube.client import AiohttpKubeApi
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


def line(kind: str, obj: Any) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


async def test_a_list_of_agent_pods_holds_only_what_is_read() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [POD]})

    def ask(resource: Resource) -> Any:
        return asked(answer, lambda api: api.list_page(resource, "calls"))

    page = await ask(AGENT_PODS)
    assert page == {"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [READ]}
    assert (await ask(PODS))["items"] == [POD]


async def test_a_list_without_items_is_empty() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "9"}})

    page = await asked(answer, lambda api: api.list_page(AGENT_PODS, "calls"))
    assert page == {"metadata": {"resourceVersion": "9"}, "items": []}


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
    assert event.object["metadata"] == {"resourceVersion": "12"}


@pytest.mark.parametrize("words", [b"nonsense\n", b'{"type": "ADDED"}\n', b'{"type": "NEVER HEARD", "object": {}}\n'])
async def test_a_watch_that_tells_nonsense_is_broken(words: bytes) -> None:
    with pytest.raises(Unreachable, match="the watch of pods broke"):
        await watched(AGENT_PODS, words)
