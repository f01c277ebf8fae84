"""Structured logging: one JSON object a line on standard output, through the standard library.

What is passed as ``extra`` becomes fields. No log line decides anything, and no secret goes into one.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

_ORDINARY = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
    "k8s_skip",
    "settings",
    "k8s_ref",
}


class JsonFormatter(logging.Formatter):
    """Turns a record into one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (RFC 3339, UTC), level, logger, message, the ``extra`` fields, and the stack of an exception."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name, value in vars(record).items() if name not in _ORDINARY}
        if record.exc_info:
            entry["stack"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Send all logging of this process to one stream as JSON.

    Args:
        level: the least severe level that is written, by name.
        stream: standard output by default.
    """
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Each request as a line of its own is noise.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
