"""`make client`: writes the client without `async` from the one with it, word by word, so that there is one to read and to mend."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "operator" / "src" / "voicepool" / "client"
SOURCE = CLIENT / "asynchronous.py"
RESULT = CLIENT / "synchronous.py"

_WORDS = {
    "for programs with an event loop.": "for programs without an event loop, and for threads. `make client` writes it.",
    "AsyncVoicepool": "Voicepool",
    "AsyncClient": "Client",
    "AsyncGenerator": "Generator",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "aclosing": "closing",
    "aclose": "close",
    "aread": "read",
    "asyncio": "time",
    "for record in page.sessions:\n                yield record": "yield from page.sessions",
    "Who is cancelled meanwhile leaves the queue.": "Who hangs up meanwhile leaves the queue.",
}
_ASYNC = re.compile(r"\b(async|await) ")


def without_async() -> str:
    """The text of the client without `async`. Raises CalledProcessError."""
    text = SOURCE.read_text()
    for one, other in _WORDS.items():
        text = text.replace(one, other)
    return _ruff(("format",), _ruff(("check", "--fix-only"), _ASYNC.sub("", text)))


def _ruff(command: tuple[str, ...], text: str) -> str:
    ruff = Path(sys.executable).parent / "ruff"
    options = ("--quiet", "--no-cache", "--stdin-filename", RESULT, "-")
    return subprocess.run([ruff, *command, *options], input=text, capture_output=True, check=True, text=True).stdout


if __name__ == "__main__":
    RESULT.write_text(without_async())
