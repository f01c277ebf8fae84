"""Brings a native cluster up and takes it down: the order of things, and what is waited for.

Every wait has a deadline and watches the components, so nothing hangs: what ends by itself is reported with the last
lines of its log.
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import shutil
import ssl
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.errors import ClusterError
from tests.cluster.native import archives, cgroups, cleanup, configuration, network, packages
from tests.cluster.native.build import COMPONENTS, Programs, cache_folder, programs
from tests.cluster.native.certificates import Authority, KeyPair, service_account_keys
from tests.cluster.native.commands import run, succeeds
from tests.cluster.native.configuration import Plan
from tests.cluster.native.layout import Layout, layout_for, valid_name
from tests.cluster.native.locks import locked
from tests.cluster.native.processes import Identity, Processes
from tests.cluster.progress import Progress
from tests.ports import free_port

_UP_DEADLINE_SECONDS = 120
_API_DEADLINE_SECONDS = 60
_NODE_DEADLINE_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a cluster that came up.

    Attributes:
        control_plane_only: whether it has no node.
        node_address: where API server and node are reached.
        server: URL of the API server.
        programs: folder of the compiled programs.
        ready: whether `up` came to its end.
    """

    control_plane_only: bool
    node_address: str
    server: str
    programs: str
    ready: bool = False


def _write(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)


class NativeCluster:
    """One cluster of this machine, running or not.

    Args:
        name: its name.
        progress: where steps are reported.

    Raises:
        ClusterError: the name cannot be used.
    """

    def __init__(self, name: str, progress: Progress | None = None) -> None:
        if not valid_name(name):
            raise ClusterError(
                f"a cluster cannot be called {name!r}",
                "use at most 32 lower case letters, digits and dashes, a letter first",
            )
        self.layout: Layout = layout_for(name, os.geteuid(), os.environ)
        self.processes = Processes(self.layout)
        self._progress = progress or Progress()

    # State

    def record(self) -> Record | None:
        """What `up` wrote down, if there is a cluster."""
        try:
            return Record(**json.loads(self.layout.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def running(self) -> bool:
        """Whether it came up, and each of its components still runs."""
        record = self.record()
        return bool(record and record.ready and self.processes.names() and not self.processes.ended())

    def _save(self, record: Record) -> None:
        fields = {name: getattr(record, name) for name in Record.__slots__}
        _write(self.layout.record, json.dumps(fields))

    # Up and down

    def up(self, control_plane_only: bool) -> bool:
        """Brings the cluster up; False when it runs already.

        Raises:
            ClusterError: something is missing or failed; nothing of the cluster is left, but a copy of its logs.
        """
        with self._own_lock():
            if self.running():
                record = self.record()
                if record is not None and record.control_plane_only != control_plane_only:
                    has = "no node" if record.control_plane_only else "a node"
                    raise ClusterError(
                        f"the cluster {self.layout.name!r} runs already, and has {has}",
                        f"`python -m tests.cluster down --name {self.layout.name}` first, or use another --name",
                    )
                return False
            if not control_plane_only and os.geteuid() != 0:
                raise ClusterError(
                    "a node needs root", "run as root, or with --control-plane-only, which needs no root"
                )
            made = self._prepare(control_plane_only)
            began = time.monotonic()
            self._remove_leftovers()
            try:
                if control_plane_only:
                    self._start_control_plane(made, began)
                else:
                    self._start_node(made, began)
            except BaseException as error:
                self._give_up(error)
                raise
            return True

    def down(self) -> bool:
        """Removes the cluster and every trace of it; False when there was none.

        Raises:
            ClusterError: something could not be removed.
        """
        with self._own_lock():
            existed = cleanup.traces(self.layout)
            with self._all_lock():
                cleanup.remove(self.layout)
            self._lock_file.unlink(missing_ok=True)
            return existed

    @property
    def _lock_file(self) -> Path:
        return self.layout.locks / f"voicepool-{self.layout.name}.lock"

    def _own_lock(self) -> Any:
        name = self.layout.name
        return locked(
            self._lock_file,
            50 * 60,
            lambda: self._progress.say(f"waiting: another command works on the cluster {name!r}"),
        )

    def _all_lock(self) -> Any:
        return locked(self.layout.locks / "voicepool.lock", _UP_DEADLINE_SECONDS)

    def _prepare(self, control_plane_only: bool) -> Programs:
        # Compiling uses the processor, installing waits for the network: side by side.
        with ThreadPoolExecutor(2) as pool:
            building = pool.submit(programs, self._progress)
            if not control_plane_only:
                pool.submit(packages.install_missing, self._progress).result()
            return building.result()

    def _remove_leftovers(self) -> None:
        if cleanup.traces(self.layout):
            self._progress.say(f"cleaning up what an earlier cluster {self.layout.name!r} left")
            with self._all_lock():
                cleanup.remove(self.layout)

    def _give_up(self, error: BaseException) -> None:
        kept = cache_folder(os.environ) / "failed" / self.layout.name
        shutil.rmtree(kept, ignore_errors=True)
        with suppress(OSError):
            shutil.copytree(self.layout.logs, kept)
            self._progress.say(f"the logs are kept in {kept}")
        try:
            with self._all_lock():
                cleanup.remove(self.layout)
            self._lock_file.unlink(missing_ok=True)
        except ClusterError as second:
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error.what}; and then: {second.what}", error.do, error.detail) from error

    # Starting

    def _start_control_plane(self, made: Programs, began: float) -> None:
        api, etcd, peer = free_port(), free_port(), free_port()
        plan = Plan(self.layout, made.folder, "127.0.0.1", api, etcd, peer)
        self._save(Record(True, plan.node_address, plan.server, str(made.folder)))
        user = self._write_pki(plan)
        self._start_api(plan, user)
        self._progress.say(f"the API is ready ({time.monotonic() - began:.1f} s)")
        self._wait_for_service_account(plan, user)
        self._save(Record(True, plan.node_address, plan.server, str(made.folder), ready=True))

    def _start_node(self, made: Programs, began: float) -> None:
        plugins, containerd = packages.cni_folder(), shutil.which("containerd")
        if plugins is None or containerd is None:
            raise ClusterError("containerd or the CNI plugins are not where they are expected", "reinstall them")
        self.layout.run.mkdir(mode=0o700, parents=True)
        self._save(Record(False, "", "", str(made.folder)))
        with self._all_lock():
            addresses = network.create(self.layout.name, self.layout.network_namespace)
            try:
                network.let_out(addresses, self.layout.name, self.layout.locks)
            except ClusterError as error:
                self._progress.say(f"pods will not reach the outside: {error.what}")
        cgroups.create(self.layout.cgroup)
        plan = Plan(
            self.layout,
            made.folder,
            addresses.node,
            api_port=6443,
            etcd_port=2379,
            etcd_peer_port=2380,
            pod_cidr=addresses.pod_cidr,
            cni_plugins=str(plugins),
            snapshotter=self._snapshotter(),
            resolver=_resolver(Path("/etc/resolv.conf")),
        )
        user = self._write_pki(plan)
        self._write_node_configuration(plan)
        self.processes.start(configuration.containerd_component(plan, containerd))
        self._start_api(plan, user)
        self._progress.say(f"the API is ready ({time.monotonic() - began:.1f} s)")
        self._load_pause(made)
        for component in (
            configuration.kube_scheduler(plan),
            configuration.kubelet_component(plan),
            configuration.kube_proxy_component(plan),
        ):
            self.processes.start(component)
        self._wait("the node to be Ready", _NODE_DEADLINE_SECONDS, lambda: self._node_ready(plan, user), "kubelet")
        self._wait_for_service_account(plan, user)
        self._progress.say(f"the node is Ready ({time.monotonic() - began:.1f} s)")
        self._save(Record(False, plan.node_address, plan.server, str(made.folder), ready=True))

    def _start_api(self, plan: Plan, user: KeyPair) -> None:
        _write(self.layout.configuration / "audit-policy.yaml", configuration.audit_policy())
        self.layout.memory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.processes.start(configuration.etcd(plan))
        self.processes.start(configuration.kube_apiserver(plan))
        self._wait(
            "the API to be ready",
            _API_DEADLINE_SECONDS,
            lambda: self._get(plan, user, "/readyz") is not None,
            "kube-apiserver",
        )
        self.processes.start(configuration.kube_controller_manager(plan))

    def _write_pki(self, plan: Plan) -> KeyPair:
        authority = Authority(f"voicepool-{self.layout.name}", datetime.datetime.now(datetime.UTC))
        pki = self.layout.pki

        def put(name: str, pair: KeyPair) -> None:
            _write(pki / f"{name}.crt", pair.certificate)
            _write(pki / f"{name}.key", pair.key)

        def client(name: str, common_name: str, organisation: str = "") -> KeyPair:
            pair = authority.issue(common_name, organisation)
            text = configuration.kubeconfig(
                f"voicepool-{self.layout.name}", plan.server, authority.own.certificate, pair
            )
            _write(pki / f"{name}.kubeconfig", text)
            return pair

        put("ca", authority.own)
        kubernetes = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
        hosts = [*kubernetes, "127.0.0.1", configuration.FIRST_SERVICE_ADDRESS, plan.node_address]
        put("kube-apiserver", authority.issue("kube-apiserver", hosts=hosts))
        put("kube-apiserver-client", authority.issue("kube-apiserver-client", "system:masters"))
        private, public = service_account_keys()
        _write(pki / "service-account.key", private)
        _write(pki / "service-account.pub", public)
        client("kube-controller-manager", "system:kube-controller-manager")
        client("kube-scheduler", "system:kube-scheduler")
        client("kube-proxy", "system:kube-proxy")
        client("kubelet", f"system:node:{plan.node_name}", "system:nodes")
        put("kubelet", authority.issue(plan.node_name, hosts=[plan.node_name, plan.node_address]))
        administrator = client("administrator", "administrator", "system:masters")
        _write(self.layout.kubeconfig, (pki / "administrator.kubeconfig").read_bytes())
        return administrator

    def _write_node_configuration(self, plan: Plan) -> None:
        folder = self.layout.configuration
        _write(folder / "containerd.toml", configuration.containerd(plan))
        _write(folder / "kubelet.yaml", configuration.kubelet(plan))
        _write(folder / "kube-proxy.yaml", configuration.kube_proxy(plan))
        _write(folder / "cni" / "10-voicepool.conflist", json.dumps(configuration.cni(plan)))

    def _snapshotter(self) -> str:
        """`overlayfs` where overlays can be mounted on the data folder, else `native`, which copies."""
        self.layout.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.layout.data) as name:
            folders = [Path(name) / part for part in ("lower", "upper", "work", "merged")]
            for folder in folders:
                folder.mkdir()
            lower, upper, work, merged = map(str, folders)
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            if succeeds("mount", "-t", "overlay", "overlay", "-o", options, merged):
                run("umount", merged)
                return "overlayfs"
        self._progress.say(
            "overlays cannot be mounted here: images are copied instead, which is slower and takes more disk"
        )
        return "native"

    def _load_pause(self, made: Programs) -> None:
        self._wait("containerd to answer", 30, lambda: self._ctr_succeeds("version"), "containerd")
        architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
        file = self.layout.data / "pause.tar"
        archives.one_program_image(made.pause, configuration.PAUSE_IMAGE, architecture, file)
        self.ctr("images", "import", str(file))
        file.unlink()

    # Waiting

    def _wait(self, what: str, deadline_seconds: float, ready: Callable[[], bool], component: str) -> None:
        deadline = time.monotonic() + deadline_seconds
        while not ready():
            self.processes.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"waited {deadline_seconds:.0f} s for {what}",
                    f"read the last lines of {component} above; often the machine is short of processor or memory",
                    self.processes.tail(component),
                )
            time.sleep(0.1)

    def _get(self, plan: Plan, user: KeyPair, path: str) -> bytes | None:
        """The answer of the API server to a GET; None unless it is 200."""
        context = ssl.create_default_context(cafile=str(self.layout.pki / "ca.crt"))
        with tempfile.TemporaryDirectory() as name:
            pair = Path(name) / "pair.pem"
            _write(pair, user.certificate + user.key)
            context.load_cert_chain(pair)
        connection = http.client.HTTPSConnection(plan.node_address, plan.api_port, timeout=5, context=context)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            return body if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _node_ready(self, plan: Plan, user: KeyPair) -> bool:
        body = self._get(plan, user, f"/api/v1/nodes/{plan.node_name}")
        if body is None:
            return False
        node = json.loads(body)
        conditions = node["status"].get("conditions", [])
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
        # The taint goes a moment after the condition; until then nothing can be scheduled.
        return ready and not node["spec"].get("taints")

    def _wait_for_service_account(self, plan: Plan, user: KeyPair) -> None:
        """Without it the API server refuses every pod."""
        path = "/api/v1/namespaces/default/serviceaccounts/default"
        self._wait(
            "the default service account",
            _API_DEADLINE_SECONDS,
            lambda: self._get(plan, user, path) is not None,
            "kube-controller-manager",
        )

    # Use

    def programs(self) -> Path:
        """Folder of the compiled programs of the running cluster."""
        record = self.record()
        if record is None:
            raise ClusterError(
                f"there is no cluster {self.layout.name!r}", f"`python -m tests.cluster up --name {self.layout.name}`"
            )
        return Path(record.programs)

    def ctr(self, *arguments: str, deadline_seconds: float = 300) -> str:
        """Runs containerd's client."""
        return run(*self._ctr(arguments), deadline_seconds=deadline_seconds)

    def _ctr_succeeds(self, *arguments: str) -> bool:
        return succeeds(*self._ctr(arguments))

    def _ctr(self, arguments: tuple[str, ...]) -> list[str]:
        return ["ctr", "--address", str(self.layout.containerd_socket), "--namespace", "k8s.io", *arguments]

    def images(self) -> dict[str, str]:
        """Names and digests of the images the node has."""
        found = {}
        for line in self.ctr("images", "list").splitlines()[1:]:
            name, _, digest, *_ = line.split()
            found[name] = digest
        return found

    def load(self, image: str) -> bool:
        """Gives an image to the node: an OCI archive, or the name of an image that buildah made.

        False when the node has it already.

        Raises:
            ClusterError: there is no such image, or the cluster has no node.
        """
        record = self.record()
        if record is None or not self.running():
            raise ClusterError(f"the cluster {self.layout.name!r} does not run", "bring it up first")
        if record.control_plane_only:
            raise ClusterError(
                f"the cluster {self.layout.name!r} has no node", "bring one up without --control-plane-only"
            )
        if Path(image).is_file():
            try:
                digest = archives.digest_of_archive(Path(image))
            except ValueError as error:
                raise ClusterError(str(error), "make it with `buildah push NAME oci-archive:FILE:NAME`") from None
            if digest in self.images().values():
                return False
            self.ctr("images", "import", image)
            return True
        return self._load_from_buildah(image)

    def _load_from_buildah(self, image: str) -> bool:
        identifier = run(
            *("buildah", "images", "--no-trunc", "--format", "{{.ID}}", image),
            do="build the image first, or give the file of an OCI archive",
        ).strip()
        loaded = self._loaded()
        if loaded.get(image) == identifier and image in self.images():
            return False
        with tempfile.TemporaryDirectory(dir=self.layout.data) as name:
            # Not an OCI archive: buildah compresses its layers whatever it is told, which takes longer than all the rest.
            archive = Path(name) / "image.tar"
            run("buildah", "push", image, f"docker-archive:{archive}:{image}", deadline_seconds=600)
            self.ctr("images", "import", str(archive))
        self.layout.loaded.write_text(json.dumps({**self._loaded(), image: identifier}))
        return True

    def _loaded(self) -> dict[str, str]:
        """Which of buildah's images the node was given last, by name."""
        try:
            found: dict[str, str] = json.loads(self.layout.loaded.read_text())
        except FileNotFoundError:
            return {}
        return found

    def component(self, name: str) -> Identity:
        """The process of a running component.

        Raises:
            ClusterError: it does not run.
        """
        identity = self.processes.identity(name)
        if identity is None:
            known = self.processes.names()
            raise ClusterError(
                f"the component {name!r} does not run", f"one of: {', '.join(known) or 'none was started'}"
            )
        return identity


def _resolver(file: Path) -> str:
    """The host's resolv.conf when pods can use it: a name server on loopback answers the host alone."""
    with suppress(OSError):
        servers = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("nameserver ")]
        if servers and not any(server.startswith("127.") or server == "::1" for server in servers):
            return str(file)
    return ""


def clusters_named(prefix: str) -> list[str]:
    """Names of this user's clusters that begin with `prefix`, running or not."""
    base = layout_for("x", os.geteuid(), os.environ)
    folders = [*base.run.parent.glob(f"voicepool-{prefix}*"), *base.data.parent.glob(f"voicepool-{prefix}*")]
    names = {folder.name.removeprefix("voicepool-").removesuffix("-data") for folder in folders if folder.is_dir()}
    return sorted(name for name in names if valid_name(name))


__all__ = ["COMPONENTS", "NativeCluster", "Record", "clusters_named"]
