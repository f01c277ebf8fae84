"""Where a native cluster keeps its files. Pure: a name and a user in, paths out.

Everything of one cluster lies under three folders that carry its name: removing them (once nothing is mounted below)
removes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one cluster.

    Attributes:
        name: the cluster's name.
        run: sockets, pid files, certificates, logs; gone after a reboot where /run is in memory.
        data: the node's images and volumes.
        memory: etcd's data; lost on purpose.
        locks: folder of the lock files of all clusters of this user.
    """

    name: str
    run: Path
    data: Path
    memory: Path
    locks: Path

    @property
    def record(self) -> Path:
        """What `up` decided, as JSON."""
        return self.run / "cluster.json"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.run / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.run / "pki"

    @property
    def logs(self) -> Path:
        """One file per component."""
        return self.run / "logs"

    @property
    def audit_log(self) -> Path:
        """The API server's audit log, JSON lines."""
        return self.run / "audit.log"

    @property
    def configuration(self) -> Path:
        """Rendered configuration files."""
        return self.run / "configuration"

    @property
    def processes(self) -> Path:
        """One record per component: how it was started, and which process it is."""
        return self.run / "processes"

    @property
    def network_namespace(self) -> Path:
        """The file that holds the network namespace."""
        return self.run / "network-namespace"

    @property
    def loaded(self) -> Path:
        """Which of buildah's images the node has, as JSON."""
        return self.run / "loaded.json"

    @property
    def containerd_state(self) -> Path:
        """Shims' bundles, sandboxes, the pods' network namespaces."""
        return self.run / "containerd"

    @property
    def containerd_socket(self) -> Path:
        """Where containerd listens."""
        return self.run / "containerd.sock"

    @property
    def folders(self) -> tuple[Path, Path, Path]:
        """The three folders that are the cluster."""
        return self.run, self.data, self.memory

    @property
    def cgroup(self) -> str:
        """Name of the control group all pods are under."""
        return f"voicepool-{self.name}"


def valid_name(name: str) -> bool:
    """Whether a cluster may be called so: lower case letters, digits and dashes, at most 32 characters."""
    return _NAME.fullmatch(name) is not None


def layout_for(name: str, user_id: int, environment: Mapping[str, str]) -> Layout:
    """The paths of the cluster `name` of a user; root's are in /run and /var/lib."""
    if user_id == 0:
        return Layout(
            name=name,
            run=Path(f"/run/voicepool-{name}"),
            data=Path(f"/var/lib/voicepool-{name}"),
            memory=Path(f"/dev/shm/voicepool-{name}"),
            locks=Path("/run/lock"),
        )
    base = Path(environment.get("XDG_RUNTIME_DIR") or f"/tmp/voicepool-{user_id}")
    return Layout(
        name=name,
        run=base / f"voicepool-{name}",
        data=base / f"voicepool-{name}-data",
        memory=Path(f"/dev/shm/voicepool-{user_id}-{name}"),
        locks=base,
    )
