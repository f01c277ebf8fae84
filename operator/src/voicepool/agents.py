"""Asks agents how they are, over HTTP.

Invariant: an answer counts only when it names the pod's own uid, since an address may have been given to another pod.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from voicepool.model import AGENT_PORT, PodFact


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """An agent's own words about itself."""

    state: str
    """starting, parked, accepted, joined or ending."""
    session_id: str | None
    pod_uid: str | None

    def has(self, session_id: str) -> bool:
        """Whether the agent has taken this session."""
        return self.session_id == session_id and self.state in ("accepted", "joined")


def make_agent_session() -> aiohttp.ClientSession:
    """For requests to agents: no connection is kept, since each pod is asked once or twice in its life; no proxy comes in between."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), trust_env=False)


def agent_url(pod: PodFact, path: str, port: int = AGENT_PORT) -> str:
    """Where a pod's agent answers."""
    host = f"[{pod.pod_ip}]" if pod.pod_ip and ":" in pod.pod_ip else pod.pod_ip
    return f"http://{host}:{port}{path}"


async def ask(
    http: aiohttp.ClientSession,
    pod: PodFact,
    *,
    timeout_seconds: float,
    connect_seconds: float,
    port: int = AGENT_PORT,
    query: Mapping[str, str] | None = None,
) -> AgentStatus | None:
    """What the agent of a pod says about itself; None when it cannot be asked.

    Args:
        http: from :func:`make_agent_session`.
        pod: whose agent.
        timeout_seconds: for the whole answer.
        connect_seconds: of them, for the connection.
        port: the agents' port.
        query: of the URL.
    """
    if pod.pod_ip is None:
        return None
    timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=connect_seconds)
    try:
        async with http.get(
            agent_url(pod, "/status", port), params=query, timeout=timeout, allow_redirects=False
        ) as answer:
            if answer.status != 200:
                return None
            words: Any = json.loads(await answer.content.read(64 * 1024))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError):
        return None
    if not isinstance(words, dict) or words.get("pod_uid") != pod.uid:
        return None
    return AgentStatus(state=str(words.get("state")), session_id=words.get("session"), pod_uid=words["pod_uid"])
