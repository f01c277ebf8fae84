"""Bots that name transports other than LiveKit: they can be built, and get parameters for LiveKit."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from pipecat.transports.base_transport import TransportParams
from pipecat.transports.livekit.transport import LiveKitParams

from voicepool_agent.other_transports import PACKAGES, with_livekit

WITHOUT_PACKAGES = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
hidden = {sorted(PACKAGES)!r}
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in hidden else find_spec(name, *more)
from voicepool_agent import other_transports
other_transports.install()
"""


def run(program: str) -> Any:
    """What a program prints as JSON, in an image without the packages of the other transports."""
    command = [sys.executable, "-c", WITHOUT_PACKAGES + "import json, sys\n" + textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_transport_can_be_imported_without_its_package_and_says_what_is_missing_when_it_is_made() -> None:
    said, left = run(
        """
        from pipecat.transports.daily.transport import DailyParams, DailyTransport
        from pipecat.transports.smallwebrtc.transport import SmallWebRTCTransport
        from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams
        assert DailyParams(audio_in_enabled=True).audio_in_enabled
        assert FastAPIWebsocketParams(audio_out_enabled=True).audio_out_enabled
        try:
            DailyTransport("room", None, "a bot")
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([said, [name for name in sys.modules if name.partition(".")[0] in hidden]]))
        """
    )
    assert said == (
        "TransportNotInstalled: DailyTransportClient needs the package daily, which is not in the image;"
        " agents of a pool are called over LiveKit"
    )
    assert left == []


def test_a_transport_does_without_a_package_that_is_there_for_another_purpose_and_a_bot_gets_it() -> None:
    command = """
    from voicepool_agent import other_transports
    other_transports.install()
    import json, sys
    from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams
    without = "fastapi" not in sys.modules and "starlette" not in sys.modules
    from fastapi import FastAPI, WebSocket
    from pipecat.transports.websocket import fastapi as first
    print(json.dumps([without, FastAPI().version, first.WebSocket is WebSocket]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(command)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, "0.1.0", False]


def test_a_transport_gets_a_package_that_the_bot_has_imported() -> None:
    command = """
    from voicepool_agent import other_transports
    other_transports.install()
    import starlette
    from pipecat.transports.websocket import fastapi
    from starlette.websockets import WebSocketState
    print(fastapi.WebSocketState is WebSocketState)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(command)], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_bot_that_imports_a_missing_package_itself_is_told_so() -> None:
    assert run(
        """
        import pipecat.transports.daily.transport
        found = []
        for name in ("daily", "aiortc", "fastapi"):
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                found.append(error.name)
        print(json.dumps(found))
        """
    ) == ["daily", "aiortc", "fastapi"]


def test_a_bot_without_an_entry_for_livekit_gets_a_livekit_transport() -> None:
    kind, taken = run(
        """
        import asyncio
        from pipecat.runner.types import LiveKitRunnerArguments
        from pipecat.runner.utils import create_transport
        from pipecat.transports.daily.transport import DailyParams
        arguments = LiveKitRunnerArguments(room_name="", url="", token="")
        params = {"daily": lambda: DailyParams(audio_in_enabled=True, audio_out_sample_rate=24000, api_key="k")}
        transport = asyncio.run(create_transport(arguments, params))
        print(json.dumps([type(transport).__name__, transport._params.model_dump(exclude_unset=True)]))
        """
    )
    assert (kind, taken) == ("LiveKitTransport", {"audio_in_enabled": True, "audio_out_sample_rate": 24000})


def test_a_bot_without_an_entry_for_livekit_keeps_the_error_for_other_arguments() -> None:
    said = run(
        """
        import asyncio
        from pipecat.runner.types import DailyRunnerArguments
        from pipecat.runner.utils import create_transport
        try:
            asyncio.run(create_transport(DailyRunnerArguments(room_url=""), {}))
        except ValueError as error:
            print(json.dumps(str(error)))
        """
    )
    assert "daily" in said


def test_an_entry_for_livekit_is_kept() -> None:
    own = LiveKitParams(audio_in_enabled=True)
    assert with_livekit({"webrtc": TransportParams, "livekit": lambda: own})["livekit"]() is own


def test_the_parameters_for_a_browser_go_before_those_for_a_telephone() -> None:
    chosen = with_livekit(
        {
            "twilio": lambda: TransportParams(audio_in_sample_rate=8000),
            "daily": lambda: TransportParams(audio_in_sample_rate=16000),
            "webrtc": lambda: TransportParams(audio_in_sample_rate=48000),
        }
    )
    assert chosen["livekit"]().audio_in_sample_rate == 48000


@pytest.mark.parametrize("params", [{}, {"other": lambda: object()}])
def test_nothing_is_made_of_nothing(params: dict[str, Any]) -> None:
    assert with_livekit(params) == params
