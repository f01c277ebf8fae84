"""A whole native cluster: it runs pods, ends without a trace, and recovers from an unclean end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.native import archives, cgroups
from tests.cluster.native.cleanup import shims
from tests.cluster.native.cluster import NativeCluster
from tests.cluster.native.processes import Identity, identify, is_alive
from tests.cluster.tool import Cluster, open_cluster

pytestmark = pytest.mark.cluster


def _run_pod(cluster: Cluster, name: str, host_network: bool = False) -> None:
    container = {"name": "main", "image": "localhost/pause:1", "imagePullPolicy": "Never"}
    spec = {"hostNetwork": host_network, "terminationGracePeriodSeconds": 1, "containers": [container]}
    cluster.apply(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}))
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s")


@dataclass(frozen=True, slots=True)
class Traces:
    """What of one cluster is on the machine, read from the machine and not from our records.

    Its network namespaces are held open, since the kernel gives the number of one that is gone to the next.
    """

    processes: frozenset[Identity]
    network_namespaces: Mapping[str, int]
    named: frozenset[str]

    def left(self, name: str) -> set[str]:
        """What is still there."""
        alive = {f"process {identity.pid}" for identity in self.processes if is_alive(identity)}
        in_use = {f"network namespace {one}" for one in set(self.network_namespaces) & set(_namespaces())}
        for descriptor in self.network_namespaces.values():
            os.close(descriptor)
        return alive | in_use | set(_named(name))


def _namespaces() -> dict[str, set[int]]:
    """The processes of each network namespace."""
    found: dict[str, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found.setdefault(os.readlink(entry / "ns" / "net"), set()).add(int(entry.name))
    return found


def _named(name: str) -> frozenset[str]:
    """Mounts, links, routes, rules, control groups, folders and links to logs that carry the cluster's name."""
    mark = f"voicepool-{name}"
    commands = (
        ["ip", "-details", "link", "show"],
        ["iptables", "-w", "10", "-t", "nat", "-S"],
        ["iptables", "-w", "10", "-t", "filter", "-S"],
    )
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    for command in commands:
        lines += subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {line for line in lines if mark in line}
    for root in cgroups.hierarchies().roots:
        found |= {str(path) for path in root.glob(f"{mark}*")}
    for folder in ("/run", "/var/lib", "/dev/shm"):
        found |= {str(path) for path in Path(folder).glob(f"{mark}*")}
    for result in Path("/var/lib/cni/results").glob("*"):
        with suppress(FileNotFoundError):
            if f"/run/{mark}/".encode() in result.read_bytes():
                found.add(str(result))
    found |= {str(path) for path in Path("/var/log/containers").glob("*") if mark in str(path.readlink())}
    return frozenset(found)


def _traces(name: str) -> Traces:
    native = NativeCluster(name)
    pods = {identity for pid in cgroups.members(native.layout.cgroup) if (identity := identify(pid))}
    own = {native.component(component) for component in native.processes.names()}
    everything = frozenset(pods | own | set(shims(native.layout.containerd_socket)))
    ids = {identity.pid for identity in everything}
    # The host's is not theirs, though a process of ours could be in it.
    held = {
        one: os.open(f"/proc/{min(members & ids)}/ns/net", os.O_RDONLY)
        for one, members in _namespaces().items()
        # The host's is not theirs, though a process of ours could be in it.
        if members & ids and one != os.readlink("/proc/self/ns/net")
    }
    return Traces(everything, held, _named(name))


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Cluster]:
    """Another cluster, beside the one that runs; not up yet."""
    other = open_cluster(f"test-{os.getpid()}-second", "native")
    yield other
    other.down()


def test_the_node_runs_a_pod_and_its_address_is_reached(cluster: Cluster) -> None:
    _run_pod(cluster, "plain")
    node = json.loads(cluster.kubectl("get", "nodes", "--output", "json"))["items"][0]
    addresses = [one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP"]
    assert addresses == [cluster.node_address]
    host = cluster.kubectl("get", "pod", "plain", "--output", "jsonpath={.status.hostIP}")
    assert host == cluster.node_address


def test_an_image_the_node_has_is_not_loaded_again(cluster: Cluster, tmp_path: Path) -> None:
    program, archive = tmp_path / "program", tmp_path / "image.tar"
    program.write_bytes(os.urandom(64))
    archives.one_program_image(program, "localhost/loaded:1", "amd64", archive)
    assert cluster.load_image(str(archive)) is True
    assert cluster.load_image(str(archive)) is False


def test_an_image_that_does_not_exist_is_one_clear_error(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="buildah"):
        cluster.load_image("localhost/no-such-image:1")


def test_two_clusters_side_by_side_and_one_goes_without_a_trace(cluster: Cluster, second: Cluster) -> None:
    assert not _named(second.name)
    assert second.up() is True
    _run_pod(second, "own-network")
    _run_pod(second, "host-network", host_network=True)
    assert second.node_address != cluster.node_address
    assert "own-network" not in cluster.kubectl("get", "pods", "--output", "name")
    before = _traces(second.name)
    # 7 components; a sandbox, a container and a shim for each of two pods; the node's network and the first pod's.
    assert len(before.processes) >= 13
    assert len(before.network_namespaces) == 2
    assert before.named
    assert second.down() is True
    assert before.left(second.name) == set()
    assert cluster.running()
    assert second.down() is False


def test_after_an_unclean_end_the_next_up_cleans_up_by_itself(cluster: Cluster, second: Cluster) -> None:
    second.up()
    _run_pod(second, "orphan")
    before = _traces(second.name)
    for component in second.components():
        second.kill(component)
    assert not second.running()
    orphans = {identity for identity in before.processes if is_alive(identity)}
    assert orphans, "shim and pod outlive containerd: else there is nothing to clean up"
    assert second.up() is True
    assert not {identity for identity in orphans if is_alive(identity)}
    _run_pod(second, "new")
    second.down()
    assert before.left(second.name) == set()


def test_a_cluster_whose_records_are_lost_is_removed_all_the_same(cluster: Cluster, second: Cluster) -> None:
    second.up()
    before = _traces(second.name)
    for identity in before.processes:
        os.kill(identity.pid, signal.SIGKILL)
    layout = NativeCluster(second.name).layout
    for file in (layout.record, *layout.processes.iterdir()):
        file.unlink()
    assert second.down() is True
    assert before.left(second.name) == set()
