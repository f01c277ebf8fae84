"""Ports of the loopback address for servers that tests start, and stop and start again.

The system gives the ports of its own range to whoever opens a connection, also that of a server which is down for a moment; so these are from below it.
Invariant: a port that was given is given to nobody else for as long as this process lives, also by another process, whether or not its server runs.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_000
_SYSTEMS_OWN = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_LOW_END = 32_768
_NODE_PORTS = 30_000
"""Kubernetes' own range begins there."""
_TRIES = 200

_marks: list[socket.socket] = []
"""One socket for each port that was given, under a name that says which. The system gives a name away once, and takes it back when the process ends."""


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """A port that nobody has at this moment, or has been given.

    Raises:
        RuntimeError: hundreds in a row were taken.
    """
    for _ in range(_TRIES):
        port = random.randrange(_LOWEST, _first_of_the_systems_own())
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if _mark(port):
            return port
    raise RuntimeError(f"{_TRIES} ports from {_LOWEST} on were all taken; is something listening on thousands of them?")


def _mark(port: int) -> bool:
    """Keep a port from being given again; False where it has been."""
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mark.bind(f"\0voicepool-tests-port-{port}")
    except OSError:
        mark.close()
        return False
    _marks.append(mark)
    return True


def _first_of_the_systems_own() -> int:
    low = int(_SYSTEMS_OWN.read_text().split()[0]) if _SYSTEMS_OWN.exists() else _USUAL_LOW_END
    # A system that gives away nearly everything leaves no choice.
    return min(low, _NODE_PORTS) if low > _LOWEST + _TRIES else _NODE_PORTS
