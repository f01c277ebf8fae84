"""What the log shows, and what it never shows."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loguru import logger

from voicepool_agent.logs import Logs, Redactor
from voicepool_agent.settings import read_settings

SETTINGS = {
    "VOICEPOOL_POD_UID": "uid-1",
    "VOICEPOOL_POOL": "demo",
    "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----",
}


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def redact() -> Redactor:
    return Redactor()


@pytest.fixture
def configured(stream: io.StringIO, redact: Redactor) -> Iterator[Callable[..., Logs]]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def make(**variables: str) -> Logs:
        logs = Logs(read_settings({**SETTINGS, **variables}), redact, stream)
        logs.configure()
        return logs

    yield make
    logger.remove()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def as_module(name: str) -> Any:
    return logger.patch(lambda record: record.update({"name": name}))


def test_a_line_is_json_with_the_session(configured: Callable[..., Logs], stream: io.StringIO) -> None:
    configured().session = "s-1"
    logger.bind(seconds=1.5).info("joined")
    (line,) = lines(stream)
    assert (line["message"], line["session"], line["pool"], line["seconds"]) == ("joined", "s-1", "demo", 1.5)


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_what_pipecat_says_while_debugging_is_never_written(
    configured: Callable[..., Logs], stream: io.StringIO, level: str
) -> None:
    configured(VOICEPOOL_LOG_LEVEL=level)
    as_module("pipecat.services.whisper.stt").debug("Transcription: [canary]")
    as_module("pipecat.services.inworld.tts").info("connected")
    assert [line["message"] for line in lines(stream)] == ["connected"]


def test_a_bot_that_sets_up_its_own_log_does_not_bring_speech_back(
    configured: Callable[..., Logs], stream: io.StringIO
) -> None:
    logs = configured()
    theirs = io.StringIO()
    logger.add(theirs, level="DEBUG")
    logs.configure()
    as_module("pipecat.services.whisper.stt").debug("Transcription: [canary]")
    assert theirs.getvalue() == ""


def test_words_that_a_service_quotes_are_left_out(configured: Callable[..., Logs], stream: io.StringIO) -> None:
    configured()
    as_module("pipecat.services.tts_service").warning("service is no longer usable, not speaking [canary\nwords]")
    assert lines(stream)[0]["message"] == "service is no longer usable, not speaking [...]"


@pytest.mark.parametrize(
    ("module", "message", "written"),
    [
        ("pipecat.services.assemblyai.stt", "Received non-JSON message: canary", "Received non-JSON message: [...]"),
        (
            "pipecat.services.openai.base_llm",
            "it: Failed to parse function call arguments: {'name': 'canary",
            "it: Failed to parse function call arguments: [...]",
        ),
        (
            "pipecat.processors.frameworks.rtvi.processor",
            "Ignoring not RTVI message: {'text': 'canary'}\n'canary'",
            "Ignoring not RTVI message: [...]",
        ),
        (
            "pipecat.processors.frameworks.rtvi.processor",
            "Invalid RTVI transport message: 1 validation error\ninput_value='canary'",
            "Invalid RTVI transport message: [...]",
        ),
        (
            "pipecat.processors.frame_processor",
            "error: 400 - {'error': {'message': 'Failed to call a function', 'failed_generation': \"canary isn't\"}}",
            "error: 400 - {'error': {'message': 'Failed to call a function', 'failed_generation': \"[...]\"}}",
        ),
        (
            "pipecat.pipeline.worker",
            "A fatal error occurred: it said 'My secret word is canary'!",
            "A fatal error occurred: it said '[...]'!",
        ),
    ],
)
def test_what_pipecat_quotes_is_left_out(
    configured: Callable[..., Logs], stream: io.StringIO, redact: Redactor, module: str, message: str, written: str
) -> None:
    configured()
    redact.speech.hear("my secret word is canary")
    as_module(module).warning(message)
    assert [line["message"] for line in lines(stream)] == [written]


def test_what_was_said_is_left_out_of_a_librarys_line_and_not_of_the_bots_own(
    configured: Callable[..., Logs], stream: io.StringIO, redact: Redactor
) -> None:
    configured(BOT=__file__)
    redact.speech.hear("my secret word is canary")
    theirs = logging.LogRecord(
        "somebody", logging.ERROR, "/lib/somebody.py", 1, "not sent: %s", ("secret word is",), None
    )
    logging.getLogger().handle(theirs)
    logging.getLogger("bot").warning("heard: secret word is")
    logger.info("heard: secret word is")
    assert [line["message"] for line in lines(stream)] == ["not sent: [...]", *2 * ["heard: secret word is"]]
    assert all("library" not in line for line in lines(stream))


def test_what_a_library_says_while_debugging_is_never_written_and_what_the_bot_says_is(
    configured: Callable[..., Logs], stream: io.StringIO
) -> None:
    configured(VOICEPOOL_LOG_LEVEL="DEBUG", BOT=__file__)
    theirs = logging.LogRecord("openai", logging.DEBUG, "/lib/openai.py", 1, "Request: canary", (), None)
    logging.getLogger().handle(theirs)
    own = logging.getLogger("bot")
    own.setLevel(logging.DEBUG)
    own.debug("mine")
    own.setLevel(logging.NOTSET)
    assert [line["message"] for line in lines(stream)] == ["mine"]


def test_registered_secrets_are_hidden_in_every_line(
    configured: Callable[..., Logs], stream: io.StringIO, redact: Redactor
) -> None:
    configured()
    redact.add("canary-token")
    redact.add_environment({"GROQ_API_KEY": "canary-key", "HOME": "/home/agent"})
    logger.info("token canary-token at /home/agent")
    logging.getLogger("aiohttp").warning("key canary-key")
    try:
        raise RuntimeError("canary-key")
    except RuntimeError:
        logger.exception("failed")
    assert "canary" not in stream.getvalue()
    assert "/home/agent" in stream.getvalue()


@pytest.mark.parametrize("secret", ['ca"nary"', "ca\\nary", "canary\nof lines", "cänary-€"])
def test_a_secret_is_hidden_however_json_writes_it_and_on_one_line(
    configured: Callable[..., Logs], stream: io.StringIO, redact: Redactor, secret: str
) -> None:
    configured(VOICEPOOL_DEBUG="true")
    redact.add(f"{secret}\n")  # as a file ends
    try:
        raise RuntimeError(secret)
    except RuntimeError:
        logger.bind(word=secret, words=[secret], error=ValueError(secret)).exception(f"the key {secret}")
    (line,) = lines(stream)
    assert line["message"] == "the key [hidden] (RuntimeError: [hidden])"
    assert (line["word"], line["words"], line["error"]) == ("[hidden]", ["[hidden]"], "[hidden]")
    assert line["trace"].endswith("RuntimeError: [hidden]")
    assert redact(" ".join(f"one line: {secret}".split())) == "one line: [hidden]"


def test_blanks_hide_nothing(redact: Redactor) -> None:
    redact.add(" " * 6)
    assert redact("a few words") == "a few words"


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
def test_what_a_collector_is_sent_in_headers_is_hidden_in_every_form(
    configured: Callable[..., Logs], stream: io.StringIO, redact: Redactor, name: str
) -> None:
    configured()
    redact.add_environment({name: "Authorization=Bearer%20first-canary,x-api-key = second-canary=", "PATH": "/bin"})
    logger.info("sent Bearer%20first-canary, that is Bearer first-canary: first-canary; second-canary= to /bin")
    (line,) = lines(stream)
    assert line["message"] == "sent [hidden], that is [hidden]: [hidden]; [hidden] to /bin"


@pytest.mark.parametrize(("debug", "shown"), [("true", True), ("false", False)])
def test_a_stack_trace_is_only_for_debugging(
    configured: Callable[..., Logs], stream: io.StringIO, debug: str, shown: bool
) -> None:
    configured(VOICEPOOL_DEBUG=debug)
    try:
        raise RuntimeError("words")
    except RuntimeError:
        logger.exception("failed")
    assert ("Traceback" in stream.getvalue()) is shown
    assert lines(stream)[0]["message"] == "failed (RuntimeError: words)"


def test_a_text_line_is_one_line(configured: Callable[..., Logs], stream: io.StringIO) -> None:
    configured(VOICEPOOL_LOG_FORMAT="text")
    logger.bind(seconds=1.5).info("parked")
    assert stream.getvalue().count("\n") == 1
    assert "parked seconds=1.5" in stream.getvalue()
