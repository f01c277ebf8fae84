"""Reads the API server's audit log while it grows, also across a rotation and a restart of the API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from tests.cluster.chaos.judge import Write, write_from_audit

INTERVAL_SECONDS = 0.5


class AuditReader:
    """Collects the writes to one namespace from now on.

    Args:
        path: the log.
        namespace: whose writes are kept.
    """

    def __init__(self, path: Path, namespace: str) -> None:
        self.writes: list[Write] = []
        self._path = path
        self._mark = f'"namespace":"{namespace}"'.encode()
        self._namespace = namespace
        self._rest = b""
        self._file: BinaryIO = path.open("rb")
        self._file.seek(0, 2)

    def close(self) -> None:
        """Read no more."""
        self._file.close()

    def read(self) -> None:
        """Take over what has been logged since."""
        while True:
            self._take(self._file.read())
            if self._path.stat().st_ino == _inode(self._file):
                return
            # Rotated. Lines may have been added between the read and the rotation; a line never spans two files.
            self._take(self._file.read())
            self._file.close()
            self._file = self._path.open("rb")

    async def follow(self) -> None:
        """Read now and then until cancelled, so that no rotated file is missed."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                self.read()
            await asyncio.sleep(INTERVAL_SECONDS)

    def _take(self, new: bytes) -> None:
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            if self._mark not in line:
                continue
            write = write_from_audit(json.loads(line))
            if write is not None and write.namespace == self._namespace:
                self.writes.append(write)


def _inode(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_ino
