"""What the processes of a deployment hold on to: read from /proc of this machine, on which the node runs as well."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of some processes together.

    Attributes:
        processes: how many there are.
        threads: of all of them.
        files: open file descriptors that are no sockets.
        sockets: open sockets.
        resident_bytes: memory, shared pages counted in each.
    """

    processes: int
    threads: int
    files: int
    sockets: int
    resident_bytes: int

    def __str__(self) -> str:
        megabytes = self.resident_bytes / 1e6
        return f"{self.processes} processes, {self.threads} threads, {self.files} files, {self.sockets} sockets, {megabytes:.1f} MB"


def footprint(processes: Sequence[int]) -> Footprint:
    """What these processes hold at this moment; one that is gone holds nothing."""
    alive = threads = files = sockets = pages = 0
    for process in processes:
        folder = Path(f"/proc/{process}")
        with suppress(OSError):
            pages += int((folder / "statm").read_text().split()[1])
            threads += len(os.listdir(folder / "task"))
            for descriptor in (folder / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    kind = os.readlink(descriptor).startswith("socket:")
                    sockets, files = sockets + kind, files + (not kind)
            alive += 1
    return Footprint(alive, threads, files, sockets, pages * os.sysconf("SC_PAGE_SIZE"))


def growth_per_step(values: Sequence[float]) -> float:
    """The slope of the line through these values that is nearest to all of them (least squares)."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    steps = sum((step - middle) ** 2 for step in range(len(values)))
    return sum((step - middle) * (value - mean) for step, value in enumerate(values)) / steps
