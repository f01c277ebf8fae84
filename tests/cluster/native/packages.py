"""Installs what the node needs from the distribution, and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.native.locks import locked
from tests.cluster.progress import Progress

_APT_GET_DEADLINE_SECONDS = 600
_LOCK = Path("/run/lock/voicepool-packages.lock")
"""apt-get waits for others who install, but not for others who update their lists, and images and node are made side by side."""
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
_NEEDED = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "conntrack": "conntrack",
}


def cni_folder() -> Path | None:
    """The folder of the CNI plugins, if there is one."""
    return next((folder for folder in CNI_FOLDERS if (folder / "ptp").exists()), None)


def missing_packages(which: Callable[[str], str | None] = shutil.which, cni: Path | None = None) -> list[str]:
    """Debian packages of the programs that are not there."""
    missing = {package for program, package in _NEEDED.items() if which(program) is None}
    if cni is None:
        missing.add("containernetworking-plugins")
    return sorted(missing)


def install_missing(progress: Progress) -> None:
    """Installs the packages that are missing, with apt-get.

    Raises:
        ClusterError: there is no apt-get, or it failed.
    """
    missing = missing_packages(cni=cni_folder())
    if not missing:
        return
    install(progress, missing, 20)


def install(progress: Progress, packages: list[str], expected_seconds: float, *, lock: Path = _LOCK) -> None:
    """Installs Debian packages, with apt-get; one caller after the other.

    Raises:
        ClusterError: there is no apt-get, or it failed.
    """
    if shutil.which("apt-get") is None:
        raise ClusterError(
            f"these are missing, and there is no apt-get to install them: {' '.join(packages)}",
            "install their counterparts of this distribution and run the same command again",
        )
    with (
        locked(lock, 2 * _APT_GET_DEADLINE_SECONDS),
        progress.step(f"installing Debian packages: {' '.join(packages)}", expected_seconds),
    ):
        _apt_get("update")
        _apt_get("install", "--yes", "--no-install-recommends", *packages)


def _apt_get(*arguments: str) -> None:
    command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_APT_GET_DEADLINE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{' '.join(command)}` did not end within 10 minutes", "run it by hand and see") from None
    if done.returncode != 0:
        raise ClusterError(
            f"`{' '.join(command)}` failed",
            "run it by hand, then run the same command of the cluster tool again",
            "\n".join((done.stdout + done.stderr).splitlines()[-12:]),
        )
