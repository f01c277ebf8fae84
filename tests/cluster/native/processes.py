"""Starts and ends the components.

A process is known by its id, its start time and its boot, so a reused id is never taken for ours.

Components outlive the tool (a session of their own, output to a file) and are found again through their records.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.native.layout import Layout

# Not the caller's: a proxy or a KUBECONFIG set there is not meant for the components.
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, for good.

    Attributes:
        pid: its id, which the kernel uses again.
        start_ticks: when it started, in clock ticks since the boot (field 22 of /proc/PID/stat).
        boot: the kernel's id of that boot.
    """

    pid: int
    start_ticks: int
    boot: str


def boot_id() -> str:
    """The kernel's id of the running boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def parse_stat(text: str) -> tuple[str, int]:
    """State letter and start time of a /proc/PID/stat; the program's name in it may hold spaces and brackets."""
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except (OSError, IndexError):
        return None


def identify(pid: int) -> Identity | None:
    """The identity of a process that runs now; None when there is none."""
    found = _stat(pid)
    return None if found is None else Identity(pid, found[1], boot_id())


def is_alive(identity: Identity) -> bool:
    """Whether exactly this process still runs; one that has exited and waits to be collected does not."""
    with suppress(ChildProcessError):
        os.waitpid(identity.pid, os.WNOHANG)
    found = _stat(identity.pid)
    if found is None or found[1] != identity.start_ticks or identity.boot != boot_id():
        return False
    # The first thread may be dead while others are still ending; they hold the process's ports until then.
    return found[0] not in "ZX" or _threads(identity.pid) > 1


def _threads(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def end(identities: Iterable[Identity], grace_seconds: float) -> None:
    """Ends processes: a polite signal, and after the grace the other one.

    Raises:
        ClusterError: one survived both.
    """
    left = [identity for identity in identities if is_alive(identity)]
    for number, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10.0)):
        if number is signal.SIGTERM and grace_seconds <= 0:
            continue
        for identity in left:
            with suppress(ProcessLookupError):
                os.kill(identity.pid, number)
        deadline = time.monotonic() + patience
        while (left := [identity for identity in left if is_alive(identity)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not left:
            return
    if left:
        ids = ", ".join(str(identity.pid) for identity in left)
        raise ClusterError(
            f"these processes do not end: {ids}", "look at them (`ps -fp ID`); they may hang in the kernel"
        )


@dataclass(frozen=True, slots=True)
class Component:
    """How to start a component.

    Attributes:
        name: its name, also of its log.
        command: program and arguments, absolute.
        network_namespace: file of the network namespace to start it in; empty for the host's.
    """

    name: str
    command: tuple[str, ...]
    network_namespace: str = ""

    @property
    def whole_command(self) -> tuple[str, ...]:
        """The command with the way into the namespace.

        Nsenter becomes the program, so the process id is the component's.
        """
        if not self.network_namespace:
            return self.command
        return ("/usr/bin/nsenter", f"--net={self.network_namespace}", "--", *self.command)


class Processes:
    """The components of one cluster."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def _record(self, name: str) -> Path:
        return self._layout.processes / f"{name}.json"

    def _read(self, name: str) -> tuple[Component, Identity] | None:
        try:
            stored = json.loads(self._record(name).read_text())
            process = stored["process"]
            component = Component(name, tuple(stored["command"]), stored["network_namespace"])
            return component, Identity(process["pid"], process["start_ticks"], process["boot"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def names(self) -> list[str]:
        """All components that were started."""
        return sorted(file.stem for file in self._layout.processes.glob("*.json"))

    def start(self, component: Component) -> Identity:
        """Starts a component; its output goes to the end of its log."""
        self._layout.logs.mkdir(parents=True, exist_ok=True)
        self._layout.processes.mkdir(parents=True, exist_ok=True)
        log = self.log(component.name)
        command = component.whole_command
        pid = os.posix_spawn(
            command[0],
            command,
            _ENVIRONMENT,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        identity = identify(pid)
        if identity is None:
            raise ClusterError(f"{component.name} ended at once", "read its log", self.tail(component.name))
        stored = {
            "command": component.command,
            "network_namespace": component.network_namespace,
            "process": asdict(identity),
        }
        temporary = self._record(component.name).with_suffix(".new")
        temporary.write_text(json.dumps(stored))
        temporary.rename(self._record(component.name))
        return identity

    def identity(self, name: str) -> Identity | None:
        """The process of a component, if it runs."""
        found = self._read(name)
        return found[1] if found and is_alive(found[1]) else None

    def argument(self, name: str, option: str) -> str:
        """The value that a component was started with, such as that of `--data-dir`.

        Raises:
            ClusterError: it was not started, or not with that.
        """
        found = self._read(name)
        for word in found[0].command if found else ():
            given, _, value = word.partition("=")
            if given == option:
                return value
        raise ClusterError(f"no component {name!r} was started with {option}", "bring the cluster up first")

    def ended(self) -> list[str]:
        """Components that were started and do not run."""
        return [name for name in self.names() if self.identity(name) is None]

    def stop(self, names: Iterable[str], grace_seconds: float) -> None:
        """Ends components together."""
        end([found for name in names if (found := self.identity(name))], grace_seconds)

    def start_again(self, name: str) -> Identity:
        """Starts a component that has ended, as it was started before.

        Raises:
            ClusterError: it was never started, or runs.
        """
        found = self._read(name)
        if found is None:
            raise ClusterError(f"no component {name!r} was started", f"one of: {', '.join(self.names()) or 'none'}")
        if is_alive(found[1]):
            raise ClusterError(f"{name} runs already", "stop it first")
        return self.start(found[0])

    def log(self, name: str) -> Path:
        """The file of a component's output."""
        return self._layout.logs / f"{name}.log"

    def tail(self, name: str, lines: int = 15) -> str:
        """The last lines of a component's output."""
        try:
            with self.log(name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 64 * 1024))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(line[:400] for line in text.splitlines()[-lines:])

    def check(self) -> None:
        """Raises a ClusterError with the last lines of the log when a component has ended by itself."""
        for name in self.ended():
            raise ClusterError(
                f"{name} has ended by itself",
                "the lines above say why; often another program uses its port, or memory or disk ran out",
                self.tail(name),
            )
