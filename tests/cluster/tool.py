"""A cluster for tests and tools, whoever provides it.

No DNS add-on runs in a native cluster: a Service is reached by its address or by the variables that Kubernetes gives to
pods.
"""

from __future__ import annotations

import abc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.native.build import cache_folder, programs
from tests.cluster.native.cluster import NativeCluster, clusters_named
from tests.cluster.native.commands import run, succeeds
from tests.cluster.native.processes import end
from tests.cluster.progress import Progress
from tests.cluster.providers import Machine, choose, look

DEFAULT_NAME = "voicepool"


class Cluster(abc.ABC):
    """A Kubernetes that is used, and perhaps made, by us.

    Args:
        name: the cluster's name.
        progress: where steps are reported.
    """

    provider: str

    def __init__(self, name: str, progress: Progress) -> None:
        self.name, self.progress = name, progress

    @abc.abstractmethod
    def up(self) -> bool:
        """Makes it usable; False when it was already. Raises ClusterError."""

    @abc.abstractmethod
    def down(self) -> bool:
        """Removes what `up` made; False when there was nothing. Raises ClusterError."""

    @abc.abstractmethod
    def running(self) -> bool:
        """Whether it can be used now."""

    @property
    @abc.abstractmethod
    def kubeconfig(self) -> Path:
        """A kubeconfig whose current context is this cluster."""

    @property
    def node_address(self) -> str:
        """An address of a node (of the control plane where there is none), reached from here and from pods."""
        template = '{.items[0].status.addresses[?(@.type=="InternalIP")].address}'
        return self.kubectl("get", "nodes", "--output", f"jsonpath={template}").strip()

    @property
    def audit_log(self) -> Path:
        """The API server's audit log, JSON lines. Raises ClusterError where there is none to read."""
        raise self._only_native("an audit log")

    @property
    def etcd_address(self) -> str:
        """URL of etcd, without credentials. Raises ClusterError where it cannot be reached from here."""
        raise self._only_native("an etcd")

    def program(self, name: str) -> str:
        """Path of `kubectl` or `helm`."""
        return name

    def kubectl(self, *arguments: str, deadline_seconds: float = 120, standard_input: str = "") -> str:
        """Runs kubectl on this cluster and gives its output. Raises ClusterError."""
        return self._client("kubectl", arguments, deadline_seconds, standard_input)

    def helm(self, *arguments: str, deadline_seconds: float = 300) -> str:
        """Runs Helm on this cluster and gives its output. Raises ClusterError."""
        return self._client("helm", arguments, deadline_seconds)

    def apply(self, manifest: str) -> str:
        """Applies a manifest (YAML or JSON). Raises ClusterError."""
        return self._client("kubectl", ("apply", "--filename", "-"), 60, manifest)

    def wait_for_api(self, deadline_seconds: float = 60) -> None:
        """Waits until the API server answers. Raises ClusterError."""
        deadline = time.monotonic() + deadline_seconds
        while not succeeds(self.program("kubectl"), "--kubeconfig", str(self.kubeconfig), "get", "--raw", "/readyz"):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the API of {self.name!r} did not answer within {deadline_seconds:.0f} s", "see its log"
                )
            time.sleep(0.1)

    def _client(self, name: str, arguments: tuple[str, ...], deadline_seconds: float, standard_input: str = "") -> str:
        command = (self.program(name), "--kubeconfig", str(self.kubeconfig), *arguments)
        return run(*command, deadline_seconds=deadline_seconds, standard_input=standard_input)

    @abc.abstractmethod
    def load_image(self, image: str) -> bool:
        """Gives an image (a name, or the file of an OCI archive) to the node; False when it has it.

        Raises ClusterError.
        """

    def load_images(self, images: Iterable[str]) -> None:
        """Gives images to the node, and says so."""
        for image in images:
            with self.progress.step(f"loading {image}", 5):
                if not self.load_image(image):
                    self.progress.say(f"{image}: the node has it already")

    def component_pid(self, component: str) -> int:
        """The process of a component such as `kube-apiserver`. Raises ClusterError."""
        raise self._only_native("processes of components")

    def stop(self, component: str, grace_seconds: float = 10) -> None:
        """Ends a component politely. Raises ClusterError."""
        raise self._only_native("processes of components")

    def kill(self, component: str) -> None:
        """Ends a component with SIGKILL. Raises ClusterError."""
        raise self._only_native("processes of components")

    def start(self, component: str) -> None:
        """Starts a component that has ended, as it was. Raises ClusterError."""
        raise self._only_native("processes of components")

    def restart(self, component: str) -> None:
        """Ends a component and starts it again. Raises ClusterError."""
        self.stop(component)
        self.start(component)

    def logs(self, component: str, lines: int = 200) -> str:
        """The last lines of a component's log. Raises ClusterError."""
        raise self._only_native("logs of components")

    def components(self) -> dict[str, bool]:
        """Components, and whether each runs; empty where that cannot be seen."""
        return {}

    def _only_native(self, what: str) -> ClusterError:
        return ClusterError(f"the provider {self.provider!r} has no {what} to use from here", "use --provider native")


class Native(Cluster):
    """A cluster of compiled programs on this machine."""

    provider = "native"

    def __init__(self, name: str, progress: Progress, control_plane_only: bool = False) -> None:
        super().__init__(name, progress)
        self._native = NativeCluster(name, progress)
        self._control_plane_only = control_plane_only

    def up(self) -> bool:
        return self._native.up(self._control_plane_only)

    def down(self) -> bool:
        return self._native.down()

    def running(self) -> bool:
        return self._native.running()

    @property
    def kubeconfig(self) -> Path:
        self._native.programs()
        return self._native.layout.kubeconfig

    @property
    def node_address(self) -> str:
        self._native.programs()
        record = self._native.record()
        return record.node_address if record else ""

    @property
    def audit_log(self) -> Path:
        return self._native.layout.audit_log

    @property
    def etcd_address(self) -> str:
        return self._native.processes.argument("etcd", "--advertise-client-urls")

    def program(self, name: str) -> str:
        return str(self._native.programs() / name)

    def load_image(self, image: str) -> bool:
        return self._native.load(image)

    def component_pid(self, component: str) -> int:
        return self._native.component(component).pid

    def stop(self, component: str, grace_seconds: float = 10) -> None:
        end([self._native.component(component)], grace_seconds)

    def kill(self, component: str) -> None:
        identity = self._native.component(component)
        os.kill(identity.pid, signal.SIGKILL)
        end([identity], 0)

    def start(self, component: str) -> None:
        self._native.processes.start_again(component)

    def logs(self, component: str, lines: int = 200) -> str:
        if component not in self._native.processes.names():
            self._native.component(component)
        return self._native.processes.tail(component, lines)

    def components(self) -> dict[str, bool]:
        processes = self._native.processes
        return {name: processes.identity(name) is not None for name in processes.names()}


class Kind(Cluster):
    """A cluster of kind, in Docker."""

    provider = "kind"

    @property
    def kubeconfig(self) -> Path:
        return cache_folder(os.environ) / f"kind-{self.name}.kubeconfig"

    def up(self) -> bool:
        self._need("kubectl", "helm")
        self.kubeconfig.parent.mkdir(parents=True, exist_ok=True)
        if self.running():
            return False
        with self.progress.step("kind makes a cluster", 60):
            run(
                *("kind", "create", "cluster", "--name", self.name, "--wait", "120s"),
                *("--kubeconfig", str(self.kubeconfig)),
                deadline_seconds=600,
                do=f"`kind delete cluster --name {self.name}`, then try again",
            )
        return True

    def down(self) -> bool:
        existed = self._exists()
        run(
            "kind", "delete", "cluster", "--name", self.name, "--kubeconfig", str(self.kubeconfig), deadline_seconds=120
        )
        self.kubeconfig.unlink(missing_ok=True)
        return existed

    def _exists(self) -> bool:
        return self.name in run("kind", "get", "clusters").split()

    def running(self) -> bool:
        return self._exists() and succeeds("kubectl", "--kubeconfig", str(self.kubeconfig), "get", "--raw", "/readyz")

    def load_image(self, image: str) -> bool:
        what = "image-archive" if Path(image).is_file() else "docker-image"
        run("kind", "load", what, image, "--name", self.name, deadline_seconds=600)
        return True

    def _need(self, *names: str) -> None:
        for name in names:
            if shutil.which(name) is None:
                raise ClusterError(f"`{name}` is not installed", f"install {name}, or use --provider native")


class Existing(Cluster):
    """A cluster that the user named. Nothing of it is made or removed by us."""

    provider = "existing"

    def __init__(self, name: str, progress: Progress, kubeconfig: str, context: str) -> None:
        super().__init__(name, progress)
        self._source, self._context = kubeconfig, context

    @property
    def kubeconfig(self) -> Path:
        # A copy with this context alone, so that no other cluster of the file can be meant by mistake.
        folder = Path(tempfile.gettempdir()) / f"voicepool-existing-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.geteuid() or folder.is_symlink():
            raise ClusterError(f"{folder} belongs to somebody else", "remove it, or set TMPDIR to a folder of your own")
        copy = folder / f"{self.name}.kubeconfig"
        config = run(
            *(self.program("kubectl"), "--kubeconfig", self._source, "config", "view"),
            *("--context", self._context, "--minify", "--flatten", "--raw"),
            do="see whether the file has that context (`kubectl config get-contexts`)",
        )
        with os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(config)
        return copy

    def program(self, name: str) -> str:
        # The one the user has fits the cluster; else the compiled one.
        return shutil.which(name) or str(programs(self.progress).folder / name)

    def up(self) -> bool:
        self.kubectl("get", "--raw", "/readyz")
        return False

    def down(self) -> bool:
        return False

    def running(self) -> bool:
        with suppress(ClusterError):
            self.kubectl("get", "--raw", "/readyz")
            return True
        return False

    def load_image(self, image: str) -> bool:
        raise ClusterError(
            f"{image} cannot be loaded into a cluster that is not ours", "push it to a registry the cluster pulls from"
        )


def open_cluster(
    name: str = DEFAULT_NAME,
    provider: str = "auto",
    control_plane_only: bool = False,
    machine: Machine | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda reason: None,
) -> Cluster:
    """A cluster by its name; it need not run yet.

    Args:
        name: the cluster's name.
        provider: one of `providers.PROVIDERS`.
        control_plane_only: no node.
        machine: what was found; looks by itself when missing.
        progress: where steps are reported.
        say: is told which provider was chosen, and why.

    Raises:
        ClusterError: no provider fits.
    """
    machine = machine or look(os.environ)
    progress = progress or Progress()
    choice = choose(provider, machine, control_plane_only)
    say(f"{choice.provider}: {choice.reason}")
    if choice.provider == "existing":
        return Existing(name, progress, machine.kubeconfig, machine.context)
    if choice.provider == "kind":
        return Kind(name, progress)
    return Native(name, progress, control_plane_only)


def remove_abandoned(prefix: str) -> None:
    """Takes down native clusters named `<prefix><process id>` (and `-more`) whose process is gone: test runs that were killed."""
    for name in clusters_named(prefix):
        owner = name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            NativeCluster(name).down()
