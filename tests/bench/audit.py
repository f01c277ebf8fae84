"""What the API server's audit log says of pods: when each write was asked for, and when it was answered."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO


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
    """Reads what was added to the log since it was opened here, also when the API server begins a new file meanwhile.

    Args:
        path: the log, of JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[tuple[BinaryIO, int]] = []
        """Open files, and where in each we begin."""
        self._open(path.stat().st_size)

    def close(self) -> None:
        """Close what was opened."""
        for file, _ in self._files:
            file.close()

    def writes(self, namespace: str) -> list[Write]:
        """See `writes`."""
        if self._path.stat().st_ino != os.fstat(self._files[-1][0].fileno()).st_ino:
            # The old file has another name now; what is open stays readable.
            self._open(0)
        found = []
        for file, start in self._files:
            file.seek(start)
            whole_lines, _, _ = file.read().rpartition(b"\n")
            found += writes(whole_lines.decode(), namespace)
        return found

    def _open(self, start: int) -> None:
        self._files.append((self._path.open("rb"), start))
