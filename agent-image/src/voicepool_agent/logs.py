"""The log: one line per event on standard error, JSON or text, with the session's id.

Invariants: Pipecat's lines below INFO are never written, nor those of other libraries below WARNING, whatever level is
set or a bot asks for (they hold what people say); what was said in the session is left out of the libraries' other
lines; a secret that was registered never appears, in no line of anybody's; a stack trace only with VOICEPOOL_DEBUG.
What a bot writes itself is its own affair. Nothing ever reads the log to decide anything.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO
from urllib.parse import unquote

from loguru import logger

from voicepool_agent.bots import bot_folder
from voicepool_agent.settings import Settings
from voicepool_agent.speech import Speech

if TYPE_CHECKING:
    from loguru import Message, Record

_SECRET_NAME = re.compile(r"(KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL)S?$")
_HEADERS_NAME = re.compile(r"^OTEL_EXPORTER_OTLP_([A-Z]+_)?HEADERS$")
"""Headers for a collector of traces: https://opentelemetry.io/docs/specs/otel/protocol/exporter/"""

_QUOTED_SPEECH = re.compile(r"\[.*\]", re.DOTALL)
"""Pipecat's services put what is to be spoken between brackets."""
_QUOTED_MESSAGE = re.compile(
    r"(non-JSON message|not RTVI message|Invalid RTVI transport message|Invalid message|function call arguments): .*",
    re.DOTALL,
)
"""Pipecat quotes a message that it cannot read: a provider's may be a transcript, a client's what somebody typed."""

_FIELD = re.compile(r"""(['"])(\w+)\1:\s*(['"])(.*?)(?<!\\)\3""", re.DOTALL)
_TELLING_FIELDS = frozenset({"message", "code", "type", "status", "title", "detail", "error", "error_code", "param"})
"""Of a provider's error in JSON; others hold what a model wrote, or what it was asked."""

LIBRARY = "library"
"""In `extra` of a line of the standard library's logging that is not the bot's own."""

_SHORTEST_SECRET = 6
"""Shorter values are words rather than secrets, and would blacken half of the log."""


class Redactor:
    """Replaces secrets in texts."""

    def __init__(self) -> None:
        self._secrets: list[str] = []
        """The longest first: one may be a part of another."""
        self.speech: Final = Speech()

    def add(self, secret: str) -> None:
        """Never show this value again: neither as it is, nor as JSON has it, nor on one line."""
        secret = secret.strip()
        forms = (secret, json.dumps(secret)[1:-1], " ".join(secret.split()))
        shown = {form for form in forms if len(form) >= _SHORTEST_SECRET}
        self._secrets = sorted({*self._secrets, *shown}, key=len, reverse=True)

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """Add the values of all variables whose names sound like a secret, and those of the headers for a collector."""
        for name, value in environment.items():
            if _SECRET_NAME.search(name) and not name.startswith("VOICEPOOL_"):
                self.add(value)
            elif _HEADERS_NAME.match(name):
                for header in value.split(","):
                    self._add_header(header.partition("=")[2].strip())

    def _add_header(self, value: str) -> None:
        # As it stands in the variable, as it is sent, and without the scheme ("Bearer ...") of an Authorization.
        sent = unquote(value)
        for form in (value, sent, sent.rpartition(" ")[2]):
            self.add(form)

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, "[hidden]")
        return text

    def quoted(self, text: str) -> str:
        """A text of somebody else's, without secrets, without what was said and without what a provider quotes."""
        return self(self.speech.hide(_FIELD.sub(_hide_field, text)))


def _hide_field(match: re.Match[str]) -> str:
    return match[0] if match[2] in _TELLING_FIELDS else f"{match[1]}{match[2]}{match[1]}: {match[3]}[...]{match[3]}"


class Logs:
    """Sets up loguru and the standard library's logging; again after a bot, which may have changed them, is loaded.

    Args:
        settings: format, level, names for every line.
        redact: applied to every line.
        stream: where the lines go.
    """

    def __init__(self, settings: Settings, redact: Redactor, stream: TextIO = sys.stderr) -> None:
        self._settings = settings
        self._redact = redact
        self._stream = stream
        self._folder = bot_folder(settings.bot)
        self.session: str | None = None

    def configure(self) -> None:
        """Make ours the only sink."""
        logger.remove()
        logger.add(
            self._write,
            level=self._settings.log_level,
            format="{message}",
            filter={"": 0, "pipecat": "INFO"},
            backtrace=False,
            diagnose=False,
            catch=True,
        )
        logging.basicConfig(handlers=[_ToLoguru(self._folder)], level=logging.WARNING, force=True)

    def _write(self, message: Message) -> None:
        record = message.record
        line = self._json(record) if self._settings.log_format == "json" else self._text(record)
        self._stream.write(self._redact(line) + "\n")
        self._stream.flush()

    def _words(self, record: Record) -> str:
        words, name = record["message"], record["name"] or ""
        if name.startswith("pipecat."):
            words = _QUOTED_MESSAGE.sub(r"\1: [...]", words)
        if name.startswith("pipecat.services."):
            words = _QUOTED_SPEECH.sub("[...]", words)
        exception = record["exception"]
        if exception and exception.type:
            words += f" ({exception.type.__name__}: {exception.value})"
        return self._redact.quoted(words) if self._is_a_librarys(record) else words

    def _is_a_librarys(self, record: Record) -> bool:
        name = record["name"] or ""
        return name.startswith("pipecat.") or record["extra"].get(LIBRARY, False)

    def _json(self, record: Record) -> str:
        fields: dict[str, Any] = {
            "time": record["time"].isoformat(timespec="milliseconds"),
            "level": record["level"].name,
            "logger": record["name"],
            "message": self._words(record),
            "session": self.session,
            "pool": self._settings.pool,
            "pod": self._settings.pod_name,
        }
        fields.update({name: value for name, value in record["extra"].items() if name not in (*fields, LIBRARY)})
        if self._settings.debug and record["exception"]:
            fields["trace"] = _trace(record)
        return json.dumps({name: value for name, value in fields.items() if value not in (None, "")}, default=str)

    def _text(self, record: Record) -> str:
        time, level = record["time"].strftime("%H:%M:%S.%f")[:-3], record["level"].name
        line = f"{time} {level:<7} {record['name']} [{self.session or '-'}] {self._words(record)}"
        extra = " ".join(f"{name}={value}" for name, value in record["extra"].items() if name != LIBRARY)
        if extra:
            line += f" {extra}"
        if self._settings.debug and record["exception"]:
            line += "\n" + _trace(record)
        return line


class _ToLoguru(logging.Handler):
    """Passes lines of the standard library's logging on: the bot's own, and those of libraries from WARNING up."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        library = self._folder is None or not Path(record.pathname).is_relative_to(self._folder)
        if library and record.levelno < logging.WARNING:
            return
        logger.patch(lambda ours: ours.update({"name": record.name})).bind(**({LIBRARY: True} if library else {})).opt(
            exception=record.exc_info
        ).log(record.levelname if record.levelname in _LEVELS else "INFO", record.getMessage())


_LEVELS: Iterable[str] = frozenset({"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"})


def _trace(record: Record) -> str:
    import traceback  # only ever needed while debugging

    exception = record["exception"]
    if exception is None or exception.value is None:
        return ""
    return "".join(traceback.format_exception(exception.value)).rstrip()
