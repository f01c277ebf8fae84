"""Holds a running gateway to its own OpenAPI document: Schemathesis makes requests from it, of every kind that the document knows and some that it does not.

In a process of its own, by its command line: what it does to Python's HTTP clients and to Hypothesis stays there, and it can be given a time.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CHECKS = Path(__file__).with_name("openapi_checks.py")
LEFT_OUT = {
    "positive_data_acceptance": "what may be named together, and what a cursor is, no schema says",
    "use_after_free": "a session that was ended is still shown, and a bot's routes do what they do",
    "ignored_auth": "wrong keys in a row are answered with 429; that no request gets in without a key is a run of its own",
}
"""Checks of Schemathesis that do not fit, and why."""
SEED = 20260301


def configuration(
    *,
    key: str | None,
    pools: list[str],
    namespaces: list[str],
    examples: int,
    phases: list[str],
    stream_seconds: float,
    leave_out_of_bots: Sequence[str] = (),
) -> str:
    """Schemathesis' settings.

    Args:
        key: an API key; None sends none, and then nothing but what is open may answer anything but 401.
        pools: names that mostly stand where a pool is named.
        namespaces: the same.
        examples: how many requests of each kind are made up.
        phases: out of coverage, fuzzing, stateful.
        stream_seconds: how long a stream of events is listened to.
        leave_out_of_bots: methods of the bots' own routes, which are all alike.
    """
    lines = [
        f"seed = {SEED}",
        f'hooks = "{CHECKS}"',
        "request-timeout = 10.0",
        "max-stream-events = 2",
        "continue-on-failure = true",
        *(("[auth.openapi.HTTPBearer]", 'bearer = "${VOICEPOOL_KEY}"') if key else ()),
        *(("[auth.openapi.APIKeyHeader]", 'api_key = "${VOICEPOOL_KEY}"') if key else ()),
        "[generation]",
        "deterministic = true",
        'database = "none"',
        f"max-examples = {examples}",
        # It would make up keys, and too many wrong ones are answered with 429.
        "with-security-parameters = false",
        "[cache]",
        "enabled = false",
        *(f"[dictionaries.pools]\nvalues = {pools}\n[dictionaries.namespaces]\nvalues = {namespaces}",),
        "[parameters]",
        *(
            f'"{name}" = {{ dictionary = "pools", probability = 0.8 }}'
            for name in ("path.pool", "path.name", "body.pool")
        ),
        '"path.namespace" = { dictionary = "namespaces", probability = 0.8 }',
        # Schemathesis' own default, and what the gateway says when something else is full or away; the document must still declare it.
        "[checks.not_a_server_error]",
        'expected-statuses = ["2xx", "3xx", "4xx", "503", "504"]',
        *(f"[checks.{name}]\nenabled = false" for name in LEFT_OUT),
        f"[checks.lets_nobody_in]\nenabled = {str(key is None).lower()}",
        f"[checks.asks_everything]\nenabled = {str(key is not None).lower()}",
        *(
            f"[phases.{name}]\nenabled = {str(name in phases).lower()}"
            for name in ("examples", "coverage", "fuzzing", "stateful")
        ),
        "[[operations]]",
        'include-path-regex = "/(events|logs)$"',
        f"request-timeout = {stream_seconds}",
        *(
            f'[[operations]]\ninclude-operation-id-regex = "^{method}_in_session"\nenabled = false'
            for method in leave_out_of_bots
        ),
    ]
    return "\n".join(lines) + "\n"


async def hold(url: str, folder: Path, *, key: str | None, deadline_seconds: float, settings: str) -> tuple[int, str]:
    """Run Schemathesis; its exit code and what it says.

    Raises:
        TimeoutError: it was not done in time.
    """
    file = folder / "schemathesis.toml"
    file.write_text(settings)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(file)),
        *("run", f"{url}/openapi.json", "--url", url, "--no-color"),
        cwd=folder,
        env={**os.environ, "VOICEPOOL_KEY": key or ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(deadline_seconds):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")
