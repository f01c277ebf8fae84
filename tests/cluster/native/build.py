"""Compiles Kubernetes, etcd, Helm, the LiveKit server and the pause program from the Go modules pinned in `programs/`.

The result lies in `$XDG_CACHE_HOME/voicepool/<version>-<key>/`, where the key covers everything that goes in. It appears
there whole (one rename), so it is never seen half made; a lock keeps two builds from doing the same work.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.native.locks import locked
from tests.cluster.progress import Progress

SOURCE = Path(__file__).parent / "programs"
COMPONENTS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)
_BUILD_DEADLINE_SECONDS = 45 * 60


@dataclass(frozen=True, slots=True)
class Programs:
    """The compiled programs.

    Attributes:
        folder: holds all of them, with a link for each component of Kubernetes.
        kube: the whole of Kubernetes; acts as the name it is called by.
        helm: Helm.
        livekit_server: the LiveKit server.
        pause: the program of a pod's sandbox.
    """

    folder: Path
    kube: Path
    helm: Path
    livekit_server: Path
    pause: Path

    def component(self, name: str) -> Path:
        """The program of a component, one of `COMPONENTS`."""
        return self.folder / name


@dataclass(frozen=True, slots=True)
class _Target:
    file: str
    package: str
    title: str
    expected_seconds: float


_TARGETS = (
    _Target("kube", ".", "compiling Kubernetes and etcd", 380),
    _Target("helm", "helm.sh/helm/v4/cmd/helm", "compiling Helm", 10),
    _Target("livekit-server", "github.com/livekit/livekit-server/cmd/server", "compiling the LiveKit server", 40),
    _Target("pause", "./pause", "compiling the pause program", 1),
)


def kubernetes_version(go_mod: str) -> str:
    """The version of Kubernetes that a go.mod pins, as `v1.37.2`."""
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)", go_mod, re.MULTILINE)
    if found is None:
        raise ValueError("go.mod does not require k8s.io/kubernetes")
    return found.group(1)


def linker_flags(version: str) -> str:
    """Flags that leave out debug information and make Kubernetes know its own version."""
    major, minor = version.removeprefix("v").split(".")[:2]
    where = "k8s.io/component-base/version"
    return f"-s -w -X {where}.gitVersion={version} -X {where}.gitMajor={major} -X {where}.gitMinor={minor}"


def cache_key(parts: Mapping[str, bytes]) -> str:
    """Twelve hexadecimal digits that change with any name or content in `parts`, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name}\0{len(parts[name])}\0".encode())
        digest.update(parts[name])
    return digest.hexdigest()[:12]


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where compiled programs are kept."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "voicepool"


def _go(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["go", *arguments],
            cwd=SOURCE,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=_BUILD_DEADLINE_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise ClusterError(
            "the program `go` is missing: it compiles Kubernetes",
            "install Go 1.21 or newer (Debian: apt-get install golang-go, from backports on Debian 12); "
            "it fetches the exact version by itself unless GOTOOLCHAIN=local is set",
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"`go {arguments[0]}` did not end within {_BUILD_DEADLINE_SECONDS // 60} minutes",
            "run it again: what is compiled already is kept; see whether the network or the disk is slow",
        ) from None
    if done.returncode != 0:
        raise ClusterError(
            f"`go {' '.join(arguments)}` failed in {SOURCE}",
            "read the lines above: a module that cannot be fetched is the network or GOPROXY; "
            "a version that is too old needs a newer Go",
            "\n".join((done.stderr or done.stdout).splitlines()[-15:]),
        )
    return done.stdout


def _inputs() -> dict[str, bytes]:
    files = [SOURCE / "go.mod", SOURCE / "go.sum", *SOURCE.rglob("*.go")]
    parts = {str(file.relative_to(SOURCE)): file.read_bytes() for file in files}
    parts["go"] = _go("env", "GOVERSION", "GOOS", "GOARCH").encode()
    return parts


def _at(folder: Path) -> Programs:
    return Programs(folder, folder / "kube", folder / "helm", folder / "livekit-server", folder / "pause")


def programs(progress: Progress | None = None) -> Programs:
    """The compiled programs; compiles them first when they are not in the cache (about 8 minutes on 2 cores).

    Raises:
        ClusterError: Go is missing, or the build failed.
    """
    progress = progress or Progress()
    version = kubernetes_version((SOURCE / "go.mod").read_text())
    cache = cache_folder(os.environ)
    folder = cache / f"{version}-{cache_key(_inputs())}"
    if folder.is_dir():
        return _at(folder)
    say = progress.say
    with locked(cache / "build.lock", _BUILD_DEADLINE_SECONDS, lambda: say("waiting for another build to end")):
        if not folder.is_dir():
            _build(folder, version, progress)
    return _at(folder)


def _build(folder: Path, version: str, progress: Progress) -> None:
    for left in folder.parent.glob(".building-*"):
        shutil.rmtree(left, ignore_errors=True)  # a build that was killed; the lock is ours
    with progress.step(f"fetching the Go modules of Kubernetes {version}", 60):
        _go("mod", "download")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as name:
        made = Path(name) / "programs"
        made.mkdir()
        for target in _TARGETS:
            flags = linker_flags(version) if target.file == "kube" else "-s -w"
            with progress.step(target.title, target.expected_seconds):
                _go("build", "-trimpath", "-ldflags", flags, "-o", str(made / target.file), target.package)
        for component in COMPONENTS:
            (made / component).symlink_to("kube")
        made.rename(folder)
