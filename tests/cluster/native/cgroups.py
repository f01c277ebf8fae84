"""Control groups: one group per cluster, below which the kubelet makes those of its pods.

Works on cgroup v1 (also mixed with v2) and on plain v2.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError

_NEEDED_V2 = ("cpuset", "cpu", "io", "memory", "pids")


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where control groups are mounted.

    Attributes:
        unified: whether there is only cgroup v2.
        roots: the mount point of each hierarchy that containers use.
    """

    unified: bool
    roots: tuple[Path, ...]


def parse_mounts(mountinfo: str) -> Hierarchies:
    """The hierarchies in a /proc/self/mountinfo."""
    v1, v2 = [], []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind = after.split(" ", 1)[0]
        where = Path(before.split(" ")[4])
        if kind == "cgroup" and where not in v1:
            v1.append(where)
        elif kind == "cgroup2" and where not in v2:
            v2.append(where)
    # Mixed: v1 has the controllers, and runc makes its groups in the v2 tree as well.
    return Hierarchies(unified=not v1, roots=tuple(v1 + v2))


def hierarchies() -> Hierarchies:
    """The hierarchies of this machine."""
    return parse_mounts(Path("/proc/self/mountinfo").read_text())


def create(name: str) -> None:
    """Makes the group in every hierarchy.

    Raises:
        ClusterError: the machine has no control groups that can be written.
    """
    found = hierarchies()
    if not found.roots:
        raise ClusterError(
            "no control groups are mounted",
            "mount them (`mount -t cgroup2 none /sys/fs/cgroup`) or use another machine",
        )
    try:
        for root in found.roots:
            if found.unified:
                _hand_down(root)
            (root / name).mkdir(exist_ok=True)
            if found.unified:
                _hand_down(root / name)
            for file in ("cpuset.mems", "cpuset.cpus"):
                if not found.unified and (root / file).exists():
                    (root / name / file).write_text((root / file).read_text())
    except OSError as error:
        raise ClusterError(
            f"control groups cannot be made: {error}",
            "run as root on the machine itself, or in a container started with --privileged --cgroupns=host",
        ) from None


def _hand_down(group: Path) -> None:
    available = (group / "cgroup.controllers").read_text().split()
    on = (group / "cgroup.subtree_control").read_text().split()
    missing = [controller for controller in _NEEDED_V2 if controller in available and controller not in on]
    if missing:
        (group / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in missing))


def members(name: str) -> set[int]:
    """Ids of all processes in the group and below."""
    found: set[int] = set()
    for root in hierarchies().roots:
        # Groups go away while they are walked through; os.walk passes over them.
        for folder, _, _ in os.walk(root / name):
            with suppress(OSError):
                found.update(int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split())
    return found


def end_members(name: str, deadline_seconds: float = 20) -> None:
    """Kills every process in the group, until none is left.

    Raises:
        ClusterError: some survived the deadline.
    """
    deadline = time.monotonic() + deadline_seconds
    while left := members(name):
        if time.monotonic() > deadline:
            raise ClusterError(f"processes of pods do not end: {sorted(left)}", "look at them (`ps -fp ID`)")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def remove(name: str, deadline_seconds: float = 10) -> None:
    """Removes the group and all below it, once it has no processes.

    Raises:
        ClusterError: the kernel still holds one at the deadline.
    """
    deadline = time.monotonic() + deadline_seconds
    for root in hierarchies().roots:
        top = root / name
        while top.is_dir():
            try:
                for folder, _, _ in os.walk(top, topdown=False):
                    Path(folder).rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the control group {top} cannot be removed: {error}", "see what runs in it"
                    ) from None
                time.sleep(0.05)
