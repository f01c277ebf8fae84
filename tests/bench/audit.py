"""What the API server's audit log says of pods: when each write was asked for, and when it was answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Write:
    """One write of a pod that the API server took."""

    verb: str
    name: str
    asked_at: float
    """Seconds since the epoch."""
    answered_at: float


def writes(lines: str, namespace: str) -> list[Write]:
    """The creates and patches of pods in a namespace that were accepted, in the order in which they were answered. Pure.

    Dry runs and writes of subresources are left out.
    """
    found = []
    for line in lines.splitlines():
        entry = json.loads(line)
        target = entry.get("objectRef") or {}
        if (
            entry.get("stage") != "ResponseComplete"
            or entry["verb"] not in ("create", "patch")
            or (target.get("resource"), target.get("namespace")) != ("pods", namespace)
            or "subresource" in target
            or entry["responseStatus"]["code"] >= 300
            or "dryRun=" in entry["requestURI"]
        ):
            continue
        name = target.get("name") or entry["responseObject"]["metadata"]["name"]
        times = (entry["requestReceivedTimestamp"], entry["stageTimestamp"])
        found.append(Write(entry["verb"], name, *(datetime.fromisoformat(time).timestamp() for time in times)))
    return found


class AuditLog:
    """Reads what was added to the log since it was opened here.

    Args:
        path: the log, of JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size

    def writes(self, namespace: str) -> list[Write]:
        """See `writes`."""
        with self._path.open("rb") as log:
            log.seek(self._position)
            whole_lines, _, _ = log.read().rpartition(b"\n")
        return writes(whole_lines.decode(), namespace)
