"""The chart on a real API server: what it makes once and keeps, and what its accounts may and may not do. No node: its pods are stored, not run."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.tool import Cluster
from voicepool.binding import active_deadline_seconds, bind_patch
from voicepool.kube.convert import pod_from_json
from voicepool.model import LABEL_POOL, LABEL_SESSION, LABEL_STATE

pytestmark = pytest.mark.control_plane

CHART = Path(__file__).parents[2] / "helm" / "voicepool"
POLICY_SECONDS = 30.0

Object = dict[str, Any]
Question = tuple[str, str]
"""A verb and a resource, as `deployments.apps` or `pods/log`."""

IMAGE = [{"op": "replace", "path": "/spec/containers/0/image", "value": "evil"}]
TOLERATION = [{"op": "add", "path": "/spec/tolerations/-", "value": {"operator": "Exists"}}]
OTHER_LABEL = [{"op": "add", "path": "/metadata/labels/app", "value": "x"}]
OTHER_POOL = [{"op": "replace", "path": "/metadata/labels/voicepool.dev~1pool", "value": "x"}]
NO_POOL = [{"op": "remove", "path": "/metadata/labels/voicepool.dev~1pool"}]
OTHER_ANNOTATION = [{"op": "replace", "path": "/metadata/annotations/example.com~1team", "value": "b"}]
NO_ANNOTATION = [{"op": "remove", "path": "/metadata/annotations/example.com~1team"}]
OTHER_OWNER = [
    {
        "op": "add",
        "path": "/metadata/ownerReferences",
        "value": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "11111111-1111-1111-1111-111111111111"}],
    }
]
UNKNOWN_ANNOTATION = [{"op": "add", "path": "/metadata/annotations/voicepool.dev~1drain-until", "value": "x"}]
DEADLINE = [{"op": "add", "path": "/spec/activeDeadlineSeconds", "value": 7260}]
SHORT_SESSION = [
    {"op": "replace", "path": "/metadata/labels/voicepool.dev~1state", "value": "bound"},
    {"op": "add", "path": "/metadata/labels/voicepool.dev~1session", "value": "s-1"},
    {"op": "add", "path": "/spec/activeDeadlineSeconds", "value": 1},
]
FINALIZER = [{"op": "add", "path": "/metadata/finalizers", "value": ["example.com/never"]}]


@dataclass(frozen=True, slots=True)
class Release:
    """The chart in a namespace of its own."""

    cluster: Cluster
    namespace: str
    pools: str
    """The namespace of the pools."""

    def upgrade(self, *values: str) -> None:
        """Install, or upgrade. A definition that another test has applied is taken over."""
        sets = [argument for value in values for argument in ("--set", value)]
        self.cluster.helm(
            *("upgrade", "--install", "voicepool", str(CHART), "--namespace", self.namespace, "--take-ownership"),
            *("--set", "livekit.url=ws://192.0.2.1:7880", "--set", "livekit.existingSecret=none", *sets),
        )

    def get(self, kind: str, name: str, namespace: str | None = None) -> Object:
        """One object; empty when there is none."""
        output = self.cluster.kubectl(
            *("get", kind, name, "--namespace", namespace or self.namespace),
            *("--ignore-not-found", "--output", "json"),
        )
        found: Object = json.loads(output or "{}")
        return found

    def account(self, component: str) -> str:
        """A flag of kubectl: speak as that component."""
        return f"--as=system:serviceaccount:{self.namespace}:voicepool-{component}"

    def may(self, component: str, *question: str, namespace: str | None = None) -> bool:
        """What the API server answers to `kubectl auth can-i`."""
        where = ("--namespace", namespace or self.pools)
        try:
            self.cluster.kubectl("auth", "can-i", *question, *where, self.account(component), "--quiet")
        except ClusterError:
            return False
        return True

    def allowed(self, component: str, questions: Sequence[Question]) -> set[Question]:
        """The questions about the pools' namespace that the API server answers with yes. The component's account asks them all at once, itself."""
        reviews = [
            {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {"namespace": self.pools, "verb": verb, **_resource(resource)}},
            }
            for verb, resource in questions
        ]
        answers = self.cluster.kubectl(
            *("create", "--filename=-", self.account(component), "--output=jsonpath={.status.allowed}{'\\n'}"),
            standard_input=json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews}),
        )
        told = zip(questions, answers.split(), strict=True)
        return {question for question, answer in told if answer == "true"}

    def patch(self, pod: str, operations: list[Object], *flags: str) -> str:
        """Patch a pod as the gateway."""
        return self.cluster.kubectl(
            *("patch", "pod", pod, "--namespace", self.pools, "--type=json", f"--patch={json.dumps(operations)}"),
            *(self.account("gateway"), *flags),
        )

    def refusal(self, pod: str, operations: list[Object]) -> str:
        """Why the API server refuses the gateway a patch; empty when it does not. Nothing is written."""
        try:
            self.patch(pod, operations, "--dry-run=server")
        except ClusterError as error:
            return error.detail
        return ""


@pytest.fixture
def release(control_plane: Cluster) -> Iterator[Release]:
    """Namespaces where nothing but restricted pods is admitted, and nothing installed yet."""
    tail = uuid.uuid4().hex[:8]
    made = Release(control_plane, f"voicepool-{tail}", f"calls-{tail}")
    for namespace in (made.namespace, made.pools):
        control_plane.kubectl("create", "namespace", namespace)
        control_plane.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    yield made
    control_plane.helm("uninstall", "voicepool", "--namespace", made.namespace, "--ignore-not-found")
    control_plane.kubectl("delete", "namespace", made.namespace, made.pools, "--wait=false")


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Iterator[Release]:
    """One installation that no test changes, with its policy in force."""
    tail = uuid.uuid4().hex[:8]
    made = Release(control_plane, f"voicepool-{tail}", f"calls-{tail}")
    for namespace in (made.namespace, made.pools):
        control_plane.kubectl("create", "namespace", namespace)
    made.upgrade(f"livekit.poolSecrets[0].namespace={made.pools}", "livekit.poolSecrets[0].name=other-server")
    _make_pod(made, "probe", {LABEL_POOL: "demo", LABEL_STATE: "warm"})
    # A policy is in force a moment after it was stored.
    deadline = time.monotonic() + POLICY_SECONDS
    while not made.refusal("probe", IMAGE):
        assert time.monotonic() < deadline, "the policy is not in force"
        time.sleep(0.1)
    yield made
    control_plane.helm("uninstall", "voicepool", "--namespace", made.namespace)
    control_plane.kubectl("delete", "namespace", made.namespace, made.pools, "--wait=false")


@pytest.fixture
def pod(installed: Release) -> str:
    """A warm pod."""
    name = f"demo-0a1b2c3d-{uuid.uuid4().hex[:6]}"
    _make_pod(installed, name, {LABEL_POOL: "demo", LABEL_STATE: "warm"})
    return name


def _resource(name: str) -> Object:
    name, _, subresource = name.partition("/")
    resource, _, group = name.partition(".")
    return {"group": group, "resource": resource, "subresource": subresource}


def _make_pod(release: Release, name: str, labels: dict[str, str]) -> None:
    owner = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "name": release.pools,
        "uid": release.get("namespace", release.pools)["metadata"]["uid"],
    }
    security = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    release.cluster.apply(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": release.pools,
                    "labels": labels,
                    "annotations": {"voicepool.dev/start-attempt": "0", "example.com/team": "a"},
                    "ownerReferences": [owner],
                },
                "spec": {"containers": [{"name": "agent", "image": "localhost/a:1", "securityContext": security}]},
            }
        )
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    status = {
        "phase": "Running",
        "startTime": now,
        "podIP": "192.0.2.7",
        "podIPs": [{"ip": "192.0.2.7"}],
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [
            {
                "name": "agent",
                "ready": True,
                "restartCount": 0,
                "image": "localhost/a:1",
                "imageID": "",
                "state": {"running": {"startedAt": now}},
            }
        ],
    }
    release.cluster.kubectl(
        *("patch", "pod", name, "--namespace", release.pools, "--subresource=status", "--type=merge"),
        f"--patch={json.dumps({'status': status})}",
    )


def _bind(release: Release, name: str) -> None:
    fact = pod_from_json(release.get("pod", name, release.pools))
    assert fact is not None
    now = datetime.now(UTC)
    operations = bind_patch(
        fact,
        session_id="s-1",
        room="room",
        bound_at=now,
        bound_by="gateway",
        caller="oidc:0123456789abcdef",
        drain_seconds=60,
        active_deadline_seconds=active_deadline_seconds(fact, 7200, now),
    )
    release.patch(name, operations)


def _kept(release: Release) -> dict[str, Any]:
    return {
        "private key": release.get("secret", "voicepool-assignment")["data"],
        "certificate": release.get("configmap", "voicepool-assignment-public")["data"],
        "keys": release.get("secret", "voicepool-api-keys")["data"],
        "first key": release.get("secret", "voicepool-first-api-key").get("data"),
        "generations": [
            release.get("deployment", f"voicepool-{name}")["metadata"]["generation"] for name in ("operator", "gateway")
        ],
    }


def test_an_upgrade_keeps_every_key_and_restarts_nothing(release: Release) -> None:
    release.upgrade()
    before = _kept(release)
    release.upgrade()
    assert _kept(release) == before


def test_an_upgrade_keeps_api_keys_that_were_added_and_does_not_bring_back_what_was_deleted(release: Release) -> None:
    release.upgrade()
    before = _kept(release)["keys"]
    partner = f"sha256:{'0' * 64} pools=default/support-line"
    patch = {"data": {"partner": base64.b64encode(partner.encode()).decode()}}
    where = ("--namespace", release.namespace)
    release.cluster.kubectl(
        "patch", "secret", "voicepool-api-keys", *where, "--type=merge", f"--patch={json.dumps(patch)}"
    )
    release.cluster.kubectl("delete", "secret", "voicepool-first-api-key", *where)
    release.upgrade()
    assert _kept(release)["keys"] == {**before, **patch["data"]}
    assert _kept(release)["first key"] is None
    remove = [{"op": "remove", "path": "/data/default"}]
    release.cluster.kubectl(
        "patch", "secret", "voicepool-api-keys", *where, "--type=json", f"--patch={json.dumps(remove)}"
    )
    release.upgrade()
    assert _kept(release)["keys"] == patch["data"]
    assert _kept(release)["first key"] is None


def test_its_pods_are_admitted_where_only_restricted_ones_are(release: Release) -> None:
    release.upgrade()
    for name, count in (("operator", 2), ("gateway", 2)):
        release.cluster.kubectl(
            *("wait", f"--for=jsonpath={{.status.unavailableReplicas}}={count}", f"deployment/voicepool-{name}"),
            *("--namespace", release.namespace, "--timeout=30s"),
        )
        pods = json.loads(
            release.cluster.kubectl(
                *("get", "pods", "--namespace", release.namespace, "--output", "json"),
                *("--selector", f"app.kubernetes.io/component={name}"),
            )
        )
        assert len(pods["items"]) == count


def test_what_is_uninstalled_leaves_the_definition_and_no_right_behind(release: Release) -> None:
    release.upgrade()
    release.cluster.helm("uninstall", "voicepool", "--namespace", release.namespace)
    names = release.cluster.kubectl(
        "get", "clusterroles,clusterrolebindings,validatingadmissionpolicies", "--output", "name"
    )
    assert release.namespace not in names
    assert release.get("crd", "voiceagentpools.voicepool.dev")


VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
READ = ("get", "list", "watch")
RESOURCES = (
    *("pods", "pods/status", "pods/exec", "pods/attach", "pods/log", "pods/portforward", "pods/proxy"),
    *("pods/ephemeralcontainers", "pods/eviction", "pods/resize"),
    *("voiceagentpools.voicepool.dev", "voiceagentpools.voicepool.dev/status"),
    *("voiceagentpools.voicepool.dev/scale", "voiceagentpools.voicepool.dev/sessions"),
    *("secrets", "configmaps", "serviceaccounts", "serviceaccounts/token", "services", "namespaces", "nodes"),
    *("endpointslices.discovery.k8s.io", "events.events.k8s.io", "leases.coordination.k8s.io"),
    *("deployments.apps", "daemonsets.apps", "jobs.batch", "poddisruptionbudgets.policy"),
    *("networkpolicies.networking.k8s.io", "roles.rbac.authorization.k8s.io"),
    *("rolebindings.rbac.authorization.k8s.io", "clusterroles.rbac.authorization.k8s.io"),
    *("clusterrolebindings.rbac.authorization.k8s.io", "validatingadmissionpolicies.admissionregistration.k8s.io"),
    *("customresourcedefinitions.apiextensions.k8s.io", "tokenreviews.authentication.k8s.io"),
    "subjectaccessreviews.authorization.k8s.io",
)
ALLOWED: dict[str, set[Question]] = {
    "operator": {
        *((verb, "pods") for verb in (*READ, "create", "patch", "delete")),
        *((verb, "voiceagentpools.voicepool.dev") for verb in READ),
        ("patch", "voiceagentpools.voicepool.dev/status"),
        *((verb, "poddisruptionbudgets.policy") for verb in ("get", "list", "watch", "create", "patch", "delete")),
        ("create", "events.events.k8s.io"),
    },
    "gateway": {
        *((verb, "pods") for verb in (*READ, "create", "patch", "delete")),
        ("get", "pods/log"),
        *((verb, "voiceagentpools.voicepool.dev") for verb in READ),
    },
}
"""What an account may do in a namespace of pools; whatever is not here is refused."""


@pytest.mark.parametrize("component", ["operator", "gateway"])
def test_of_all_verbs_and_resources_an_account_may_use_those_it_needs(installed: Release, component: str) -> None:
    questions = [(verb, resource) for verb in VERBS for resource in RESOURCES]
    assert installed.allowed(component, questions) == ALLOWED[component]


def test_the_reviews_of_tokens_are_allowed_only_where_they_are_switched_on(release: Release) -> None:
    reviews = ("tokenreviews.authentication.k8s.io", "subjectaccessreviews.authorization.k8s.io")
    release.upgrade()
    assert not any(release.may("gateway", "create", review) for review in reviews)
    release.upgrade("access.tokenReview.audience=voicepool")
    assert all(release.may("gateway", "create", review) for review in reviews)
    assert not any(release.may("operator", "create", review) for review in reviews)


@pytest.mark.parametrize("component", ["operator", "gateway"])
@pytest.mark.parametrize(
    "manifest",
    [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "forged"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "forged"}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "forged"}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "forged"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [],
        },
        {
            "apiVersion": "voicepool.dev/v1alpha1",
            "kind": "VoiceAgentPool",
            "metadata": {"name": "forged"},
            "spec": {"template": {"spec": {"containers": [{"name": "agent", "image": "localhost/evil:1"}]}}},
        },
    ],
    ids=lambda manifest: manifest["kind"],
)
def test_a_write_that_an_account_does_not_need_is_refused(installed: Release, component: str, manifest: Object) -> None:
    with pytest.raises(ClusterError) as caught:
        installed.cluster.kubectl(
            *("create", "--filename=-", "--namespace", installed.pools, installed.account(component)),
            standard_input=json.dumps(manifest),
        )
    assert "forbidden" in caught.value.detail.lower()


def test_the_gateway_may_read_the_secret_that_is_listed(installed: Release) -> None:
    assert installed.may("gateway", "get", "secret/other-server")
    assert not installed.may("gateway", "get", "secret/another")
    assert not installed.may("gateway", "list", "secrets")
    assert not installed.may("operator", "get", "secret/other-server")


def test_the_operator_may_hold_its_lease_and_no_other(installed: Release) -> None:
    for verb in ("get", "patch"):
        assert installed.may("operator", verb, "lease/voicepool-operator", namespace=installed.namespace)
        assert not installed.may("operator", verb, "lease/another", namespace=installed.namespace)
    assert installed.may("operator", "create", "leases", namespace=installed.namespace)
    assert not installed.may("operator", "delete", "lease/voicepool-operator", namespace=installed.namespace)
    assert not installed.may("operator", "create", "leases")
    assert not installed.may("gateway", "get", "lease/voicepool-operator", namespace=installed.namespace)


def test_with_one_namespace_the_accounts_have_rights_there_and_nowhere_else(release: Release) -> None:
    release.upgrade(f"watchNamespaces={{{release.pools}}}")
    for component in ("operator", "gateway"):
        assert release.may(component, "list", "pods")
        assert release.may(component, "watch", "voiceagentpools")
        assert not release.may(component, "list", "pods", namespace="default")
        assert not release.may(component, "watch", "voiceagentpools", namespace="default")


def test_the_policy_lets_a_bind_through(installed: Release, pod: str) -> None:
    _bind(installed, pod)
    bound = installed.get("pod", pod, installed.pools)
    assert bound["metadata"]["labels"][LABEL_SESSION] == "s-1"
    assert "ownerReferences" not in bound["metadata"]
    assert bound["spec"]["activeDeadlineSeconds"] > 7200


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        (IMAGE, "nothing but activeDeadlineSeconds"),
        (TOLERATION, "nothing but activeDeadlineSeconds"),
        (OTHER_LABEL, "no label but voicepool.dev/state and voicepool.dev/session"),
        (OTHER_POOL, "no label but voicepool.dev/state and voicepool.dev/session"),
        (NO_POOL, "no label but voicepool.dev/state and voicepool.dev/session"),
        (OTHER_ANNOTATION, "no annotation but those that a bind writes"),
        (NO_ANNOTATION, "no annotation but those that a bind writes"),
        (UNKNOWN_ANNOTATION, "no annotation but those that a bind writes"),
        (DEADLINE, "changes a pod once"),
        (SHORT_SESSION, "changes a pod once"),
        (OTHER_OWNER, "no other owner and no finalizer"),
        (FINALIZER, "no other owner and no finalizer"),
    ],
    ids=[
        *("image", "toleration", "label", "pool", "no-pool", "annotation", "no-annotation", "unknown-annotation"),
        *("deadline", "short-session", "owner", "finalizer"),
    ],
)
def test_the_policy_refuses_the_gateway_what_no_bind_does(
    installed: Release, pod: str, operations: list[Object], words: str
) -> None:
    assert words in installed.refusal(pod, operations)


def test_a_bound_pod_stays_bound_to_its_session(installed: Release, pod: str) -> None:
    _bind(installed, pod)
    back = [{"op": "replace", "path": "/metadata/labels/voicepool.dev~1state", "value": "warm"}]
    other = [{"op": "replace", "path": "/metadata/labels/voicepool.dev~1session", "value": "s-2"}]
    assert "stays bound" in installed.refusal(pod, back)
    assert "stays bound" in installed.refusal(pod, other)


def test_a_bound_pod_is_changed_no_more(installed: Release, pod: str) -> None:
    _bind(installed, pod)
    other = [{"op": "replace", "path": "/metadata/annotations/voicepool.dev~1caller", "value": "somebody-else"}]
    shorter = [{"op": "replace", "path": "/spec/activeDeadlineSeconds", "value": 120}]
    assert "changes a pod once" in installed.refusal(pod, other)
    assert "changes a pod once" in installed.refusal(pod, shorter)


@pytest.mark.parametrize(
    "metadata",
    [
        {"labels": {LABEL_POOL: "demo", LABEL_STATE: "bound"}},
        {"labels": {LABEL_POOL: "demo", LABEL_STATE: "warm"}},
        {
            "labels": {LABEL_POOL: "demo", LABEL_STATE: "warm"},
            "annotations": {"voicepool.dev/cold-start": "s-1"},
        },
    ],
    ids=["bound", "for-nobody", "without-an-owner"],
)
def test_the_gateway_creates_no_pod_but_a_cold_start(installed: Release, metadata: Object) -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "forged", "namespace": installed.pools, **metadata},
        "spec": {"containers": [{"name": "agent", "image": "localhost/evil:1"}]},
    }
    with pytest.raises(ClusterError) as caught:
        installed.cluster.kubectl(
            "create",
            "--dry-run=server",
            "--filename=-",
            installed.account("gateway"),
            standard_input=json.dumps(manifest),
        )
    assert "for one waiting caller only" in caught.value.detail


def test_the_gateway_may_touch_no_pod_but_an_agent(installed: Release, pod: str) -> None:
    _make_pod(installed, "other", {"app": "other"})
    label = [{"op": "add", "path": "/metadata/labels/voicepool.dev~1pool", "value": "demo"}]
    assert "agent pods only" in installed.refusal("other", label)
    delete = ("delete", "pod", "--namespace", installed.pools, installed.account("gateway"), "--wait=false")
    with pytest.raises(ClusterError) as caught:
        installed.cluster.kubectl(*delete, "other")
    assert "agent pods only" in caught.value.detail
    installed.cluster.kubectl(*delete, pod)


def test_nobody_else_is_held_by_the_policy(installed: Release, pod: str) -> None:
    installed.cluster.kubectl(
        *("patch", "pod", pod, "--namespace", installed.pools, "--type=json", f"--patch={json.dumps(IMAGE)}")
    )
