"""What Schemathesis checks of each answer beside its own checks. It loads this file by its path, in its own process (see `openapi.py`)."""

from __future__ import annotations

from typing import Any

import schemathesis

TRACES = ("Traceback (most recent call last)", 'File "/', "site-packages")


def tells_no_stack_trace(_context: Any, response: Any, _case: Any) -> None:
    """No answer has a piece of a stack trace in it."""
    for trace in TRACES:
        assert trace not in response.text, f"the answer has {trace!r} in it"


def lets_nobody_in(_context: Any, response: Any, case: Any) -> None:
    """Without a key everything that wants one is a 401, whatever else is wrong with the request."""
    if response.status_code == 405 or (response.status_code == 404 and response.json()["code"] == "NOT_FOUND"):
        # There is no such method or route, for anybody.
        return
    demanded = case.operation.definition.raw.get("security")
    wanted = case.path == "/livekit/webhook" or (demanded is not None and {} not in demanded)
    assert not wanted or response.status_code == 401, f"answered with {response.status_code} to somebody without a key"


class AsksEverything:
    """A run that never came to the heart of the gateway would find nothing."""

    def __init__(self) -> None:
        self.answered: set[tuple[str, int]] = set()

    def after_response(self, _context: Any, response: Any, case: Any) -> None:
        """Remember what was answered."""
        self.answered.add((case.operation.label, response.status_code))

    def after_run(self, _context: Any) -> None:
        """A session was started, and what there is was shown."""
        good = {label for label, status in self.answered if status in (200, 201)}
        starts = {
            "POST /start",
            "POST /v1/public/{pool}/start",
            "POST /api/session/start",
            "POST /v1/{pool}/livekit/token",
        }
        assert good & starts, "no session was ever started"
        missing = {
            "GET /v1/agents/{pool}/sessions",
            "GET /v1/agents/{pool}/events",
            "GET /v1/organizations/{namespace}/services/{pool}",
            "GET /metrics/v1/namespaces/{namespace}/pools/{name}",
            "GET /metrics",
            "GET /readyz",
        } - good
        assert not missing, f"never answered with 200: {', '.join(sorted(missing))}"


schemathesis.check(tells_no_stack_trace)
schemathesis.check(lets_nobody_in)
AsksEverything.__name__ = "asks_everything"
schemathesis.check(AsksEverything)
