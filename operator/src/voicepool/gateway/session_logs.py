"""The logs of agents, as the kubelet keeps them: each line is read when the one before it has been taken, and none is kept.

The host process in the agent leaves words of conversations and secrets out before they are written. What a bot itself prints stands there as it is, and is
shown to whoever may use the pool.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from datetime import datetime

from voicepool.gateway.errors import ClusterUnavailable, SessionNotFound
from voicepool.gateway.options import GatewayOptions
from voicepool.kube.api import Forbidden, KubeApiError, LogApi, NotFound
from voicepool.model import AGENT_CONTAINER, PodFact
from voicepool.session_api import LogLine

_LINE = re.compile(
    rb"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)) ?(?P<log>.*)", re.DOTALL
)
MAX_LINES = 5000
"""Of one answer."""


def line_of(line: bytes) -> LogLine:
    """A line of a log that begins with its time."""
    match = _LINE.fullmatch(line)
    if match is None:
        return LogLine(timestamp="", log=line.decode(errors="replace"))
    return LogLine(timestamp=match["time"].decode(), log=match["log"].decode(errors="replace"))


def is_time(value: str) -> bool:
    """Whether this can be the time of a line."""
    if len(value) > 40 or " " in value or _LINE.fullmatch(value.encode()) is None:
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


class SessionLogs:
    """Reads logs.

    Args:
        api: the API server, over connections of its own: one that follows a log is taken for hours.
        options: limits.
    """

    def __init__(self, api: LogApi, options: GatewayOptions) -> None:
        self._api = api
        self._options = options

    async def tail(self, pod: PodFact, lines: int) -> list[LogLine]:
        """The last lines of an agent.

        Raises:
            SessionNotFound: the pod is gone.
            ClusterUnavailable: the log cannot be read.
        """
        async with self._open(pod, follow=False, tail=lines, since=None) as log:
            return [line async for line in log]

    @contextlib.asynccontextmanager
    async def follow(self, pod: PodFact, lines: int, since: str | None = None) -> AsyncIterator[AsyncIterator[LogLine]]:
        """The last lines of an agent, and then each that it writes, until its container ends. Leaving the context stops the reading.

        Args:
            pod: whose agent.
            lines: how many of those that there are.
            since: the time of a line; only what comes after it.

        Raises:
            SessionNotFound: the pod is gone.
            ClusterUnavailable: the log cannot be read; also while it is read.
        """
        async with self._open(pod, follow=True, tail=None if since else lines, since=since) as log:
            yield log

    @contextlib.asynccontextmanager
    async def _open(
        self, pod: PodFact, *, follow: bool, tail: int | None, since: str | None
    ) -> AsyncIterator[AsyncIterator[LogLine]]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                lines = await stack.enter_async_context(
                    self._api.pod_log(
                        pod.namespace,
                        pod.name,
                        container=AGENT_CONTAINER,
                        follow=follow,
                        tail_lines=tail,
                        since=since,
                        limit_bytes=None if follow else self._options.max_log_bytes,
                        timeout_seconds=self._options.log_timeout_seconds,
                    )
                )
            except KubeApiError as error:
                raise _refusal(error, pod) from None
            yield _read(lines, pod, since)


async def _read(lines: AsyncIterator[bytes], pod: PodFact, since: str | None) -> AsyncIterator[LogLine]:
    try:
        async for raw in lines:
            line = line_of(raw)
            # The API server knows whole seconds only. A node writes all its times with the same number of digits.
            if since is None or line.timestamp > since:
                yield line
    except KubeApiError as error:
        raise _refusal(error, pod) from None


def _refusal(error: KubeApiError, pod: PodFact) -> SessionNotFound | ClusterUnavailable:
    if isinstance(error, NotFound):
        return SessionNotFound(f"The pod of the session {pod.session} is gone, and its log with it.")
    if isinstance(error, Forbidden):
        return ClusterUnavailable(
            f"The gateway's account may not read the logs of pods (pods/log) in {pod.namespace}; check the chart's RBAC."
        )
    return ClusterUnavailable(
        f"The log of the session {pod.session} could not be read ({type(error).__name__}).", retry_after_seconds=2
    )
