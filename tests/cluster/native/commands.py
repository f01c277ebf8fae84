"""Runs short programs of the machine (ip, iptables, ctr, ...), each with a deadline."""

from __future__ import annotations

import subprocess

from tests.cluster.errors import ClusterError


def run(
    *command: str,
    deadline_seconds: float = 30,
    do: str = "read the lines above and try again",
    standard_input: str = "",
) -> str:
    """Runs a program to its end and gives its output.

    Raises:
        ClusterError: it is missing, failed, or took longer than the deadline.
    """
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command, input=standard_input, capture_output=True, text=True, timeout=deadline_seconds, check=False
        )
    except FileNotFoundError:
        raise ClusterError(
            f"the program `{command[0]}` is missing", f"install it; it is needed for `{shown}`"
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{shown}` did not end within {deadline_seconds:.0f} s", do) from None
    if done.returncode != 0:
        raise ClusterError(f"`{shown}` failed ({done.returncode})", do, (done.stderr or done.stdout)[-3000:])
    return done.stdout


def succeeds(*command: str, deadline_seconds: float = 30) -> bool:
    """Whether a program ends well."""
    try:
        run(*command, deadline_seconds=deadline_seconds)
    except ClusterError:
        return False
    return True
