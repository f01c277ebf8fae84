"""A control plane without a node, as tests use it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.cluster.errors import ClusterError
from tests.cluster.native import configuration
from tests.cluster.native.cluster import NativeCluster
from tests.cluster.native.processes import Component
from tests.cluster.progress import Progress
from tests.cluster.providers import Machine
from tests.cluster.tool import Cluster, open_cluster

pytestmark = pytest.mark.control_plane

POD = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "agent", "image": "localhost/none:1"}]}}


def test_a_second_up_finds_it_running_and_changes_nothing(control_plane: Cluster) -> None:
    before = control_plane.component_pid("kube-apiserver")
    assert control_plane.up() is False
    assert control_plane.component_pid("kube-apiserver") == before


def test_pods_are_stored_and_their_changes_written_down(control_plane: Cluster) -> None:
    manifest = {**POD, "metadata": {"name": "audited", "labels": {"state": "warm"}}}
    control_plane.apply(json.dumps(manifest))
    control_plane.kubectl("label", "pod", "audited", "state=bound", "--overwrite")
    control_plane.kubectl("delete", "pod", "audited")
    events = [json.loads(line) for line in control_plane.audit_log.read_text().splitlines()]
    mine = [event for event in events if event.get("objectRef", {}).get("name") == "audited"]
    patches = [event for event in mine if event["verb"] == "patch"]
    assert patches[-1]["requestObject"]["metadata"]["labels"] == {"state": "bound"}
    assert mine[-1]["user"]["username"] == "administrator"


def test_what_has_lost_its_owner_is_collected(control_plane: Cluster) -> None:
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}}
    control_plane.apply(json.dumps(owner))
    uid = control_plane.kubectl("get", "configmap", "owner", "--output", "jsonpath={.metadata.uid}")
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}
    control_plane.apply(json.dumps({**POD, "metadata": {"name": "owned", "ownerReferences": [reference]}}))
    control_plane.kubectl("delete", "configmap", "owner", "--cascade=background")
    control_plane.kubectl("wait", "--for=delete", "pod/owned", "--timeout=30s")


def test_roles_are_enforced(control_plane: Cluster) -> None:
    nobody = "--as=system:serviceaccount:default:default"
    with pytest.raises(ClusterError, match="failed") as caught:
        control_plane.kubectl("get", "secrets", nobody)
    assert "Forbidden" in caught.value.detail


def test_the_api_server_killed_and_started_again_has_lost_nothing(control_plane: Cluster) -> None:
    control_plane.kubectl("create", "configmap", "kept")
    control_plane.kill("kube-apiserver")
    assert not control_plane.running()
    control_plane.start("kube-apiserver")
    control_plane.wait_for_api()
    assert "kept" in control_plane.kubectl("get", "configmap", "kept", "--output", "name")


def test_images_cannot_be_loaded_where_there_is_no_node(control_plane: Cluster) -> None:
    with pytest.raises(ClusterError, match="has no node"):
        control_plane.load_image("localhost/none:1")


def test_an_unknown_component_is_refused_with_the_names_there_are(control_plane: Cluster) -> None:
    with pytest.raises(ClusterError, match="does not run") as caught:
        control_plane.logs("kube-api")
    assert "kube-apiserver" in caught.value.do


def test_a_component_that_cannot_start_is_shown_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, control_plane: Cluster, tmp_path: Path
) -> None:
    def broken(plan: configuration.Plan) -> Component:
        return Component("etcd", ("/bin/sh", "-c", "echo the disk is full; exit 1"))

    lines: list[str] = []
    monkeypatch.setattr(configuration, "etcd", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(_cache_with(control_plane, tmp_path)))
    failing = NativeCluster(f"{control_plane.name}-broken", Progress(lines.append))
    with pytest.raises(ClusterError, match="etcd has ended by itself") as caught:
        failing.up(control_plane_only=True)
    assert caught.value.detail == "the disk is full"
    assert not any(folder.exists() for folder in failing.layout.folders)
    assert "the disk is full" in (tmp_path / "voicepool/failed" / failing.layout.name / "etcd.log").read_text()
    assert str(tmp_path) in lines[-1]


def _cache_with(control_plane: Cluster, folder: Path) -> Path:
    """A cache of its own that has the programs already."""
    compiled = Path(control_plane.program("kubectl")).parent
    (folder / "voicepool").mkdir()
    (folder / "voicepool" / compiled.name).symlink_to(compiled)
    return folder


def test_a_named_cluster_is_used_by_its_context_alone_and_never_taken_down(
    control_plane: Cluster, tmp_path: Path
) -> None:
    context = f"voicepool-{control_plane.name}"
    config = yaml.safe_load(control_plane.kubeconfig.read_text())
    config["contexts"].append({"name": "production", "context": {"cluster": "other", "user": "other"}})
    config["current-context"] = "production"
    named = tmp_path / "kubeconfig"
    named.write_text(yaml.safe_dump(config))
    machine = replace(_NOWHERE, kubeconfig=str(named), context=context)
    existing = open_cluster(f"{control_plane.name}-named", machine=machine, progress=control_plane.progress)
    assert existing.provider == "existing"
    assert existing.up() is False
    used = yaml.safe_load(existing.kubeconfig.read_text())
    assert used["current-context"] == context
    assert [one["name"] for one in used["contexts"]] == [context]
    assert existing.down() is False
    assert existing.running()
    existing.kubeconfig.unlink()


_NOWHERE = Machine(linux=False, root=False, docker=False, kind=False, kubeconfig="", context="")
