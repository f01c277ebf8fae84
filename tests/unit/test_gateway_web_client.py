"""Pipecat's prebuilt web client: off unless asked for, and how its user's key reaches the gateway."""

from __future__ import annotations

import base64
import importlib.resources
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.gateways import API_KEY, World, world

from voicepool.gateway.app import create_app
from voicepool.settings import SettingsError

PAGE = {"Sec-Fetch-Site": "same-origin"}
"""What a browser says of a call that a page makes of its own origin."""


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        made.pool()
        made.pods(1)
        yield made


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()}


async def test_there_is_no_page_unless_it_is_asked_for(here: World) -> None:
    client = (await here.gateway()).client
    assert (await client.get("/client/")).status_code == 404
    refused = await client.post("/start", json={}, headers=PAGE | basic(API_KEY))
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")


async def test_the_page_and_its_files_are_served(here: World) -> None:
    client = (await here.gateway(web_client=True)).client
    assert (await client.get("/client")).headers["Location"] == "/client/"
    page = await client.get("/client/")
    assert page.status_code == 200
    files = re.findall(r'(?:src|href)="\./([^"]+)"', page.text)
    assert files
    for file in files:
        assert (await client.get(f"/client/{file}")).status_code == 200


def test_the_page_asks_for_what_the_gateway_answers() -> None:
    assets = importlib.resources.files("pipecat_ai_prebuilt") / "client" / "dist" / "assets"
    scripts = [
        file.read_text() for file in assets.iterdir() if file.name.startswith("index-") and file.name.endswith(".js")
    ]
    assert any("startBotParams:{endpoint:`/start`,requestData:{transport:`livekit`}}" in script for script in scripts)


async def test_the_browser_asks_its_user_for_a_key_and_sends_it_as_a_password(here: World) -> None:
    client = (await here.gateway(web_client=True)).client
    body = {"transport": "livekit"}
    refused = await client.post("/start", json=body, headers=PAGE)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith('Basic realm="voicepool')
    wrong = await client.post("/start", json=body, headers=PAGE | basic("wrong"))
    assert (wrong.status_code, wrong.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    answer = await client.post("/start", json=body, headers=PAGE | basic(API_KEY))
    assert answer.status_code == 200
    assert {"url", "token"} <= answer.json().keys()


@pytest.mark.parametrize("site", [None, "cross-site", "same-site", "none"])
async def test_no_other_page_can_use_the_key_that_a_browser_remembers(here: World, site: str | None) -> None:
    client = (await here.gateway(web_client=True)).client
    headers = basic(API_KEY) | ({"Sec-Fetch-Site": site} if site else {})
    refused = await client.post("/start", json={}, headers=headers)
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert not here.kube.bound()


async def test_the_password_is_a_key_for_the_start_alone(here: World) -> None:
    client = (await here.gateway(web_client=True)).client
    refused = await client.get("/v1/agents/demo/sessions", headers=PAGE | basic(API_KEY))
    assert refused.status_code == 401


@pytest.mark.parametrize("credentials", ["Basic ", "Basic %%%", "Basic bm8gY29sb24=", "Basic w6Q6/w=="])
async def test_credentials_that_make_no_sense_are_a_401(here: World, credentials: str) -> None:
    client = (await here.gateway(web_client=True)).client
    refused = await client.post("/start", json={}, headers=PAGE | {"Authorization": credentials})
    assert refused.status_code == 401


async def test_a_missing_package_is_said_in_words(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await here.gateway()
    object.__setattr__(gateway.services.options, "web_client", True)
    monkeypatch.setitem(sys.modules, "pipecat_ai_prebuilt.frontend", None)
    with pytest.raises(
        SettingsError, match=r"VOICEPOOL_WEB_CLIENT: the package pipecat-ai-prebuilt, .* switch the setting off"
    ):
        create_app(gateway.services)
