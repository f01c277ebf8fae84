"""Which kind of cluster is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.providers import CONTEXT_VARIABLE, KUBECONFIG_VARIABLE, Machine, choose, look

BARE = Machine(linux=True, root=True, docker=False, kind=False, kubeconfig="", context="")
LAPTOP = replace(BARE, linux=False, root=False, docker=True, kind=True)
NAMED = replace(BARE, kubeconfig="some-file", context="mine")


def test_a_bare_linux_machine_gets_a_native_cluster() -> None:
    assert choose("auto", BARE, control_plane_only=False).provider == "native"


def test_a_docker_engine_with_kind_comes_before_native() -> None:
    assert choose("auto", LAPTOP, control_plane_only=False).provider == "kind"
    assert choose("auto", replace(BARE, docker=True, kind=True), control_plane_only=False).provider == "kind"


def test_a_named_cluster_comes_before_everything() -> None:
    choice = choose("auto", replace(LAPTOP, kubeconfig="some-file", context="mine"), control_plane_only=False)
    assert choice.provider == "existing"
    assert "'mine' of some-file" in choice.reason


@pytest.mark.parametrize("half", [replace(NAMED, context=""), replace(NAMED, kubeconfig="")])
def test_a_cluster_named_by_half_is_refused_rather_than_guessed(half: Machine) -> None:
    with pytest.raises(ClusterError, match="both be named"):
        choose("auto", half, control_plane_only=False)


def test_a_cluster_that_nobody_named_is_not_used() -> None:
    with pytest.raises(ClusterError, match="must both be named"):
        choose("existing", BARE, control_plane_only=False)


def test_the_kubeconfig_of_everyday_work_is_not_looked_at() -> None:
    found = look({"KUBECONFIG": "work-file", "HOME": "/home/somebody"})
    assert (found.kubeconfig, found.context) == ("", "")
    named = look({KUBECONFIG_VARIABLE: "test-file", CONTEXT_VARIABLE: "test"})
    assert (named.kubeconfig, named.context) == ("test-file", "test")


def test_a_control_plane_alone_needs_no_root() -> None:
    assert choose("auto", replace(BARE, root=False), control_plane_only=True).provider == "native"


def test_where_nothing_fits_the_error_says_what_to_do() -> None:
    with pytest.raises(ClusterError, match="kind: kind is not installed; native: a node needs root") as caught:
        choose("auto", replace(BARE, root=False), control_plane_only=False)
    assert KUBECONFIG_VARIABLE in caught.value.do
    assert "--control-plane-only" in caught.value.do


@pytest.mark.parametrize(
    ("provider", "machine", "reason"),
    [
        ("kind", BARE, "kind is not installed"),
        ("kind", replace(LAPTOP, docker=False), "no Docker engine answers"),
        ("native", LAPTOP, "this is not Linux"),
    ],
)
def test_a_provider_asked_for_that_cannot_work_says_why(provider: str, machine: Machine, reason: str) -> None:
    with pytest.raises(ClusterError, match=reason):
        choose(provider, machine, control_plane_only=False)
