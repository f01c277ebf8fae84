"""Bots that fail, each in one way: the quiet bot with one thing changed."""

from __future__ import annotations

from tests.e2e.bound import QUIET_BOT


def _changed(old: str, new: str, *imports: str) -> str:
    """The quiet bot with the first text replaced by the second; it must be there."""
    assert old in QUIET_BOT
    return "".join(f"import {name}\n" for name in imports) + QUIET_BOT.replace(old, new)


def _first(line: str, *imports: str) -> str:
    """The quiet bot with a line that it runs before all others."""
    beginning = "async def bot(runner_args):"
    return _changed(beginning, f"{beginning}\n    {line}", *imports)


def _when_a_caller_comes(line: str, *imports: str) -> str:
    """The quiet bot with a line that it runs when a caller is there."""
    running = "    runner = WorkerRunner"
    handler = f"""
    @transport.event_handler("on_client_connected")
    async def fail(_transport, _client):
        {line}

{running}"""
    return _changed(running, handler, *imports)


_TRANSPORT = QUIET_BOT[QUIET_BOT.index("    transport = ") : QUIET_BOT.index("    worker = ")]

CANNOT_BE_BUILT = {
    "syntax_error.py": "async def bot(:",
    "missing_key.py": _first("key = os.environ['SPEECH_API_KEY']", "os"),
    "missing_module.py": f"import speech_toolkit\n{QUIET_BOT}",
    "own_transport.py": _changed(
        _TRANSPORT,
        """\
    from pipecat.transports.daily.transport import DailyParams, DailyTransport
    transport = DailyTransport("https://example.org/room", None, "bot", DailyParams())
""",
    ),
    "no_transport.py": _changed("Pipeline([transport.input(), transport.output()])", "Pipeline([])"),
    "returns.py": "async def bot(runner_args):\n    return\n",
    "reads_body.py": _first("name = runner_args.body.get('name')"),
    "holds_up.py": _first("time.sleep(600)", "time"),
    "never_ready.py": f"def readyz():\n    return False\n{QUIET_BOT}",
}
FAILS_IN_CALLS = {
    "needs_a_name.py": _first("name = runner_args.body['name']"),
    "blocks.py": _when_a_caller_comes("time.sleep(600)", "time"),
    "holds_the_lock.py": _when_a_caller_comes("sum(range(10**15))"),
    "eats_memory.py": _when_a_caller_comes("fail.hoard = b'x' * 2**30"),
    "long_goodbye.py": f"import asyncio\n{QUIET_BOT}\nasync def goodbye(worker, reason):\n    await asyncio.sleep(600)\n",
}
