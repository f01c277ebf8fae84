"""The parts of the native cluster that need no cluster."""

from __future__ import annotations

import datetime
import ipaddress
import json
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from tests.cluster.__main__ import main
from tests.cluster.errors import ClusterError
from tests.cluster.native import archives, build, cgroups, cleanup, configuration, network, packages, processes
from tests.cluster.native.certificates import Authority, KeyPair
from tests.cluster.native.layout import Layout, layout_for, valid_name
from tests.cluster.native.locks import locked
from tests.cluster.progress import Progress, words

NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
LAYOUT = layout_for("one", 0, {})
PLAN = configuration.Plan(LAYOUT, Path("/programs"), "10.213.0.2", 6443, 2379, 2380, "10.214.0.0/24", "/cni")


# Names and paths


@pytest.mark.parametrize("name", ["voicepool", "a", "test-17", "a1"])
def test_ordinary_names_are_valid(name: str) -> None:
    assert valid_name(name)


@pytest.mark.parametrize("name", ["", "../x", "A", "-a", "a-", "1a", "a" * 33, "a/b", "a b"])
def test_names_that_would_not_be_safe_in_a_path_are_not_valid(name: str) -> None:
    assert not valid_name(name)


def test_two_clusters_share_no_folder() -> None:
    for user, environment in ((0, {}), (1000, {}), (1000, {"XDG_RUNTIME_DIR": "/run/user/1000"})):
        one, two = (layout_for(name, user, environment).folders for name in ("one", "two"))
        assert not any(a.is_relative_to(b) or b.is_relative_to(a) for a in one for b in two)


# Certificates


def test_a_client_certificate_carries_user_and_group_and_serves_no_one() -> None:
    pair = Authority("ca", NOW).issue("system:node:n", "system:nodes")
    certificate = x509.load_pem_x509_certificate(pair.certificate)
    assert certificate.subject.rfc4514_string() == "CN=system:node:n,O=system:nodes"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [one._name for one in usage] == ["clientAuth"]


def test_a_server_certificate_names_its_hosts_and_is_signed_by_the_authority() -> None:
    authority = Authority("ca", NOW)
    certificate = x509.load_pem_x509_certificate(authority.issue("s", hosts=["kubernetes", "10.96.0.1"]).certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["kubernetes"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.96.0.1")]
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.own.certificate))


def test_a_certificate_counts_a_little_before_now() -> None:
    certificate = x509.load_pem_x509_certificate(Authority("ca", NOW).issue("c").certificate)
    assert certificate.not_valid_before_utc < NOW < certificate.not_valid_after_utc


# Configuration


def test_a_kubeconfig_holds_everything_itself() -> None:
    config = yaml.safe_load(configuration.kubeconfig("c", "https://h:1", b"CA", KeyPair(b"CERT", b"KEY")))
    assert config["current-context"] == config["contexts"][0]["name"] == "c"
    assert config["clusters"][0]["cluster"]["certificate-authority-data"] == "Q0E="
    assert set(config["users"][0]["user"]) == {"client-certificate-data", "client-key-data"}


def test_the_audit_log_never_has_the_body_of_a_secret() -> None:
    rules = yaml.safe_load(configuration.audit_policy())["rules"]
    bodies = [rule for rule in rules if rule["level"] in ("Request", "RequestResponse")]
    resources = [resource for rule in bodies for group in rule["resources"] for resource in group.get("resources", [])]
    assert "pods" in resources
    assert not {"secrets", "*"} & set(resources)
    assert all(group["group"] in ("", "voicepool.dev") for rule in bodies for group in rule["resources"])


def test_components_of_a_node_start_in_the_network_namespace_of_the_cluster() -> None:
    component = configuration.kube_apiserver(PLAN)
    assert component.whole_command[1] == f"--net={LAYOUT.network_namespace}"
    assert "--authorization-mode=Node,RBAC" in component.command


def test_a_control_plane_alone_listens_on_loopback_and_in_no_namespace() -> None:
    alone = replace(PLAN, pod_cidr="", node_address="127.0.0.1", api_port=40000)
    component = configuration.kube_apiserver(alone)
    assert component.whole_command == component.command
    assert "--bind-address=127.0.0.1" in component.command
    assert "--secure-port=40000" in component.command


def test_the_node_keeps_everything_in_the_folders_of_the_cluster() -> None:
    assert f'state = "{LAYOUT.run}/containerd"' in configuration.containerd(PLAN)
    assert f'root = "{LAYOUT.data}/containerd"' in configuration.containerd(PLAN)
    kubelet = yaml.safe_load(configuration.kubelet(PLAN))
    assert kubelet["podLogsDir"].startswith(str(LAYOUT.data))
    assert kubelet["cgroupRoot"] == "/voicepool-one"
    assert configuration.cni(PLAN)["plugins"][0]["ipam"]["dataDir"].startswith(str(LAYOUT.data))


# Network


def test_the_first_free_addresses_are_taken() -> None:
    assert network.free_addresses(["192.0.2.0/24"]).index == 0
    assert network.free_addresses(["10.213.0.0/24", "10.214.1.7"]).index == 2


def test_addresses_inside_a_network_of_somebody_else_are_not_free() -> None:
    with pytest.raises(ClusterError, match="in use"):
        network.free_addresses(["10.192.0.0/11"])


def test_only_the_rules_of_the_cluster_are_removed() -> None:
    saved = "\n".join(
        [
            "-P FORWARD ACCEPT",
            "-A FORWARD -i voicepool0 -m comment --comment voicepool-one -j ACCEPT",
            "-A FORWARD -i voicepool1 -m comment --comment voicepool-one-more -j ACCEPT",
            '-A FORWARD -m comment --comment "not voicepool-one" -j DROP',
        ]
    )
    expected = ["-D", "FORWARD", "-i", "voicepool0", "-m", "comment", "--comment", "voicepool-one", "-j", "ACCEPT"]
    assert network.marked_rules(saved, "one") == [expected]


def test_links_are_found_by_the_mark_of_the_cluster() -> None:
    listing = json.dumps([{"ifname": "eth0"}, {"ifname": "voicepool3", "ifalias": "voicepool-one"}])
    assert network.links_of(listing, "one") == ["voicepool3"]
    assert network.links_of(listing, "two") == []
    assert network.other_clusters(listing, "two")
    assert not network.other_clusters(listing, "one")


# Control groups


MIXED = """30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"""


def test_a_mixed_machine_has_a_group_in_every_hierarchy() -> None:
    found = cgroups.parse_mounts(MIXED)
    assert not found.unified
    assert [path.name for path in found.roots] == ["cpu", "memory", "unified"]


def test_a_machine_with_cgroup_v2_alone_is_told_apart() -> None:
    found = cgroups.parse_mounts("30 24 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate")
    assert found == cgroups.Hierarchies(unified=True, roots=(Path("/sys/fs/cgroup"),))


# Cleaning up


def test_mounts_are_unmounted_from_the_inside_out_and_only_those_of_the_cluster() -> None:
    lines = [
        f"1 0 0:1 / {path} rw - tmpfs t rw"
        for path in ("/", "/run/voicepool-one/a", "/run/voicepool-one-more/a", "/run/voicepool-one/a/b\\040c")
    ]
    folders = (Path("/run/voicepool-one"),)
    assert cleanup.mounts_below("\n".join(lines), folders) == ["/run/voicepool-one/a/b c", "/run/voicepool-one/a"]


def test_a_shim_belongs_to_the_containerd_whose_socket_it_names() -> None:
    shim = b"/usr/bin/containerd-shim-runc-v2\0-namespace\0k8s.io\0-address\0/run/one.sock\0"
    assert cleanup.is_shim_of(shim, Path("/run/one.sock"))
    assert not cleanup.is_shim_of(shim, Path("/run/two.sock"))
    assert not cleanup.is_shim_of(b"/bin/grep\0-address\0/run/one.sock\0", Path("/run/one.sock"))
    assert not cleanup.is_shim_of(b"", Path("/run/one.sock"))


# Processes


def _layout(folder: Path) -> Layout:
    return Layout("one", folder / "run", folder / "data", folder / "memory", folder)


def test_a_component_is_found_again_by_another_tool_and_ended(tmp_path: Path) -> None:
    component = processes.Component("sleeper", (sys.executable, "-c", "import time; time.sleep(600)"))
    identity = processes.Processes(_layout(tmp_path)).start(component)
    other = processes.Processes(_layout(tmp_path))
    assert other.identity("sleeper") == identity
    other.stop(["sleeper"], grace_seconds=5)
    assert other.ended() == ["sleeper"]
    assert not processes.is_alive(identity)


def test_a_process_id_used_again_is_not_taken_for_ours() -> None:
    mine = processes.identify(1)
    assert mine is not None
    assert processes.is_alive(mine)
    assert not processes.is_alive(replace(mine, start_ticks=mine.start_ticks + 1))
    assert not processes.is_alive(replace(mine, boot="another"))


def test_a_process_whose_first_thread_is_gone_is_alive_while_another_goes_on() -> None:
    program = (
        "import ctypes, threading, time; "
        "threading.Thread(target=time.sleep, args=(60,)).start(); "
        "print(flush=True); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            identity = processes.identify(process.pid)
            assert identity is not None
            deadline = time.monotonic() + 10
            while processes.parse_stat(Path(f"/proc/{process.pid}/stat").read_text())[0] != "Z":
                assert time.monotonic() < deadline
            assert processes.is_alive(identity)
        finally:
            process.kill()
        process.wait()
        assert not processes.is_alive(identity)


def test_a_process_that_ignores_the_polite_signal_is_ended_all_the_same(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    ours = processes.Processes(_layout(tmp_path))
    identity = ours.start(processes.Component("stubborn", (sys.executable, "-c", script)))
    while not ours.tail("stubborn"):
        assert processes.is_alive(identity)
    ours.stop(["stubborn"], grace_seconds=0.1)
    assert not processes.is_alive(identity)


def test_a_component_that_ended_by_itself_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    ours = processes.Processes(_layout(tmp_path))
    identity = ours.start(processes.Component("broken", (sys.executable, "-c", "raise SystemExit('port in use')")))
    while processes.is_alive(identity):
        pass
    with pytest.raises(ClusterError, match="broken has ended by itself") as caught:
        ours.check()
    assert "port in use" in caught.value.detail


def test_a_component_can_be_started_again_as_it_was(tmp_path: Path) -> None:
    ours = processes.Processes(_layout(tmp_path))
    component = processes.Component("sleeper", (sys.executable, "-c", "import time; time.sleep(600)"))
    first = ours.start(component)
    with pytest.raises(ClusterError, match="runs already"):
        ours.start_again("sleeper")
    ours.stop(["sleeper"], grace_seconds=5)
    second = ours.start_again("sleeper")
    assert second != first
    assert processes.is_alive(second)
    ours.stop(["sleeper"], grace_seconds=5)


def test_a_stat_line_is_read_right_also_when_the_program_has_brackets_in_its_name() -> None:
    after = " ".join(["S", *(str(number) for number in range(4, 40))])
    assert processes.parse_stat(f"7 (a) b) {after}") == ("S", 22)


def test_a_lock_is_not_shared_and_the_wait_for_it_ends(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        locked(tmp_path / "lock", 1),
        pytest.raises(ClusterError, match="another process has held"),
        locked(tmp_path / "lock", 0, lambda: said.append("waiting")),
    ):
        pass
    assert said == ["waiting"]


def test_a_lock_file_that_its_holder_deleted_keeps_the_next_two_apart(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", 1):
        (tmp_path / "lock").unlink()
    with locked(tmp_path / "lock", 1), pytest.raises(ClusterError), locked(tmp_path / "lock", 0):
        pass


# Building and packages


def test_the_pinned_version_is_read_from_go_mod() -> None:
    text = (build.SOURCE / "go.mod").read_text()
    assert build.kubernetes_version(text).startswith("v1.")
    with pytest.raises(ValueError, match="does not require"):
        build.kubernetes_version("module x\n")


def test_the_cache_key_changes_with_every_input_and_not_with_their_order() -> None:
    key = build.cache_key({"a": b"1", "b": b"2"})
    assert key == build.cache_key({"b": b"2", "a": b"1"})
    assert len({key, build.cache_key({"a": b"1"}), build.cache_key({"a": b"12", "b": b""})}) == 3


def test_only_missing_packages_are_installed() -> None:
    def all_there(name: str) -> str:
        return f"/usr/bin/{name}"

    assert packages.missing_packages(all_there, Path("/cni")) == []
    assert packages.missing_packages(all_there, None) == ["containernetworking-plugins"]
    assert "containerd" in packages.missing_packages(lambda name: None, None)


def test_two_installations_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of apt-get's lists is one that it does not wait for: it fails at once."""
    apt_get = tmp_path / "apt-get"
    apt_get.write_text(
        f"#!/bin/sh\nmkdir {tmp_path}/lists-lock || exit 100\nsleep 0.1\nrmdir {tmp_path}/lists-lock\necho $* >> {tmp_path}/done\n"
    )
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    progress = Progress(write=lambda line: None)
    with ThreadPoolExecutor(2) as threads:
        both = [
            threads.submit(packages.install, progress, [name], 1.0, lock=tmp_path / "lock")
            for name in ("runc", "buildah")
        ]
    for one in both:
        one.result()
    assert len((tmp_path / "done").read_text().splitlines()) == 4


# Archives


def test_an_image_archive_is_whole_and_names_its_image(tmp_path: Path) -> None:
    program, file = tmp_path / "pause", tmp_path / "image.tar"
    program.write_bytes(b"program")
    archives.one_program_image(program, "localhost/pause:1", "amd64", file)
    with tarfile.open(file) as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    entry = json.loads(contents["index.json"])["manifests"][0]
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "localhost/pause:1"
    manifest = json.loads(contents["blobs/" + entry["digest"].replace(":", "/")])
    for blob in (manifest["config"], *manifest["layers"]):
        assert len(contents["blobs/" + blob["digest"].replace(":", "/")]) == blob["size"]
    assert archives.digest_of_archive(file) == entry["digest"]


def test_a_file_that_is_no_archive_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not an OCI archive"):
        archives.digest_of_archive(tmp_path / "x")


# What people see


def test_a_step_says_how_long_it_will_take_and_took() -> None:
    lines: list[str] = []
    clock = iter([0.0, 0.0, 1.0, 400.0, 400.0])
    with Progress(lines.append, lambda: next(clock)).step("compiling", 380):
        pass
    assert lines[0].endswith("compiling (expected: 6 min 20 s)")
    assert "done in" in lines[1]


def test_a_failed_step_does_not_look_done() -> None:
    lines: list[str] = []

    def failing() -> None:
        with Progress(lines.append).step("compiling", 380):
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert "failed after" in lines[-1]


def test_durations_are_words() -> None:
    assert [words(seconds) for seconds in (8.24, 45.4, 380)] == ["8.2 s", "45 s", "6 min 20 s"]


def test_an_error_says_what_and_what_to_do_without_a_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--name", "Not A Name", "--provider", "native", "--control-plane-only"]) == 1
    shown = capsys.readouterr().err
    assert "cannot be called 'Not A Name'" in shown
    assert "What to do:" in shown
    assert "Traceback" not in shown


def test_the_tool_starts_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.cluster", "--help"], capture_output=True, text=True, check=True)
    assert (
        "control"
        in subprocess.run(
            [sys.executable, "-m", "tests.cluster", "up", "--help"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert "kubeconfig" in done.stdout
