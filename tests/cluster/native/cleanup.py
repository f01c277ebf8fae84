"""Removes a cluster, whatever state it is in: records or none, processes alive, killed, or gone with a reboot.

Nothing is searched by a loose name: components by their records, shims by the socket they serve, pods by the cluster's
control group, mounts by the cluster's folders, links and rules by the mark they carry. A folder is deleted only when
nothing is mounted below it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.native import cgroups, network
from tests.cluster.native.commands import run, succeeds
from tests.cluster.native.layout import Layout
from tests.cluster.native.processes import Identity, Processes, end, identify


def mounts_below(mountinfo: str, folders: tuple[Path, ...]) -> list[str]:
    """Mount points in or below the folders, in the order in which they can be unmounted."""
    found = []
    for line in mountinfo.splitlines():
        # Spaces and the like are written in octal.
        where = line.split(" ")[4].encode().decode("unicode_escape")
        if any(Path(where).is_relative_to(folder) for folder in folders):
            found.append(where)
    return found[::-1]


def is_shim_of(command_line: bytes, socket: Path) -> bool:
    """Whether a /proc/PID/cmdline is that of a containerd shim that serves the containerd at a socket."""
    words = command_line.decode(errors="replace").split("\0")
    if not Path(words[0]).name.startswith("containerd-shim"):
        return False
    return any(flag == "-address" and value == str(socket) for flag, value in pairwise(words))


def shims(socket: Path) -> list[Identity]:
    """The shims of one containerd, alive also when that containerd is not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                identity = identify(int(entry.name))
                if identity and is_shim_of((entry / "cmdline").read_bytes(), socket):
                    found.append(identity)
    return found


def traces(layout: Layout) -> bool:
    """Whether anything of a cluster is on the machine."""
    return any(folder.exists() for folder in layout.folders)


def remove(layout: Layout) -> None:
    """Removes everything of a cluster. Does nothing, successfully, when there is nothing.

    Raises:
        ClusterError: something could not be removed; running it again continues.
    """
    processes = Processes(layout)
    names = processes.names()
    # The kubelet first, or it would start again what is ended; containerd last, or mounts stay busy.
    processes.stop([name for name in names if name == "kubelet"], 2)
    if os.geteuid() == 0:
        cgroups.end_members(layout.cgroup)
        end(shims(layout.containerd_socket), 0)
    processes.stop([name for name in names if name not in ("kubelet", "kube-apiserver", "etcd")], 2)
    # These two wait for their clients before they end; there is nothing to save.
    processes.stop([name for name in names if name in ("kube-apiserver", "etcd")], 0)
    if os.geteuid() == 0:
        _remove_what_needs_root(layout)
    for folder in layout.folders:
        _delete(folder)


def _remove_what_needs_root(layout: Layout) -> None:
    end(shims(layout.containerd_socket), 0)
    cgroups.end_members(layout.cgroup)
    for _ in range(20):
        left = mounts_below(Path("/proc/self/mountinfo").read_text(), layout.folders)
        if not left:
            break
        for mount in left:
            if not succeeds("umount", mount):
                run("umount", "--lazy", mount)
    cgroups.remove(layout.cgroup)
    if shutil.which("ip") and shutil.which("iptables"):
        network.remove(layout.name, layout.locks)
    _delete_links_into(Path("/var/log/containers"), layout.data)
    _delete_results(Path("/var/lib/cni/results"), layout.run)


def _delete_results(folder: Path, run_folder: Path) -> None:
    # What CNI remembers of a pod's network until the pod is ended politely; it names the pod's network namespace.
    for result in folder.glob("*"):
        with suppress(FileNotFoundError):
            if f"{run_folder}/".encode() in result.read_bytes():
                result.unlink()


def _delete_links_into(folder: Path, target: Path) -> None:
    # The kubelet links the logs of containers there whatever its own folders are.
    if folder.is_dir():
        for link in folder.iterdir():
            if link.is_symlink() and Path(os.readlink(link)).is_relative_to(target):
                link.unlink(missing_ok=True)


def _delete(folder: Path) -> None:
    if left := mounts_below(Path("/proc/self/mountinfo").read_text(), (folder,)):
        raise ClusterError(
            f"still mounted: {', '.join(left)}", "unmount them by hand, then take the cluster down again"
        )
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ClusterError(
            f"{folder} cannot be removed: {error}", "remove it by hand, as the user who made it"
        ) from None
