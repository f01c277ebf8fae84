"""Which kind of cluster is used, and why. Looking at the machine is apart from choosing.

* `existing`: a cluster the user named, kubeconfig and context both. One that nobody named is never touched, and
  ~/.kube/config never read.
* `kind`: where a Docker engine answers and kind is installed.
* `native`: Linux and root; a control plane alone needs no root.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tests.cluster.errors import ClusterError
from tests.cluster.native.commands import succeeds

PROVIDERS = ("auto", "native", "kind", "existing")
KUBECONFIG_VARIABLE = "VOICEPOOL_TEST_KUBECONFIG"
CONTEXT_VARIABLE = "VOICEPOOL_TEST_CONTEXT"


@dataclass(frozen=True, slots=True)
class Machine:
    """What counts for the choice.

    Attributes:
        linux: whether this is Linux.
        root: whether we are root.
        docker: whether a Docker engine answers.
        kind: whether kind is installed.
        kubeconfig: the kubeconfig the user named; empty for none.
        context: the context the user named; empty for none.
    """

    linux: bool
    root: bool
    docker: bool
    kind: bool
    kubeconfig: str
    context: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A provider, and the reason in words."""

    provider: str
    reason: str


def look(environment: Mapping[str, str], kubeconfig: str = "", context: str = "") -> Machine:
    """Looks at this machine."""
    kind = shutil.which("kind") is not None
    return Machine(
        linux=sys.platform == "linux",
        root=os.geteuid() == 0,
        # The client alone is no engine; asked only where kind could use it.
        docker=kind and succeeds("docker", "version", "--format", "{{.Server.Version}}", deadline_seconds=10),
        kind=kind,
        kubeconfig=kubeconfig or environment.get(KUBECONFIG_VARIABLE, ""),
        context=context or environment.get(CONTEXT_VARIABLE, ""),
    )


def choose(requested: str, machine: Machine, control_plane_only: bool) -> Choice:
    """Chooses a provider.

    Raises:
        ClusterError: the requested one, or any, cannot be used here.
    """
    problems = _problems(machine, control_plane_only)
    if requested != "auto":
        if problem := problems[requested]:
            raise ClusterError(f"the provider {requested!r} cannot be used: {problem[0]}", problem[1])
        return Choice(requested, "asked for")
    if machine.kubeconfig or machine.context:
        if problem := problems["existing"]:
            raise ClusterError(f"the named cluster cannot be used: {problem[0]}", problem[1])
        return Choice("existing", f"the context {machine.context!r} of {machine.kubeconfig} was named")
    if control_plane_only and not problems["native"]:
        return Choice("native", "a control plane alone needs only Linux and Go")
    if not problems["kind"]:
        return Choice("kind", "a Docker engine answers and kind is installed")
    if not problems["native"]:
        return Choice("native", "Linux, root, and no Docker engine with kind")
    reasons = "; ".join(f"{name}: {problem[0]}" for name, problem in problems.items() if problem)
    raise ClusterError(
        f"no kind of cluster can be made here ({reasons})",
        "on Linux run as root, or with --control-plane-only; elsewhere install Docker and kind; "
        f"or name a cluster with {KUBECONFIG_VARIABLE} and {CONTEXT_VARIABLE}",
    )


def _problems(machine: Machine, control_plane_only: bool) -> dict[str, tuple[str, str] | None]:
    existing = kind = native = None
    if not (machine.kubeconfig and machine.context):
        existing = (
            "a kubeconfig and a context must both be named",
            f"set {KUBECONFIG_VARIABLE} and {CONTEXT_VARIABLE}",
        )
    if not machine.kind:
        kind = ("kind is not installed", "install kind and Docker")
    elif not machine.docker:
        kind = ("no Docker engine answers", "start Docker; `docker version` must show a server")
    if not machine.linux:
        native = ("this is not Linux", "use Docker and kind")
    elif not machine.root and not control_plane_only:
        native = ("a node needs root", "run as root, or with --control-plane-only")
    return {"existing": existing, "kind": kind, "native": native}
