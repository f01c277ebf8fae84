"""The chart, rendered by the real Helm: what it installs, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.cluster.errors import ClusterError
from tests.cluster.native import build
from tests.cluster.providers import choose, look
from voicepool import crd
from voicepool.gateway.custom_metrics import API_GROUP, API_VERSION
from voicepool.gateway.peers import PORT_NAME
from voicepool.gateway.tracing import is_on
from voicepool.settings import GatewaySettings, OperatorSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "voicepool"
LIVEKIT = ("livekit.url=ws://192.0.2.1:7880", "livekit.apiKey=devkey", "livekit.apiSecret=a-secret-nobody-guesses")
CUSTOM_METRICS = ("customMetrics.enabled=true", "customMetrics.force=true")
ACCESS = (
    *("access.oidc.issuer=https://issuer.example.com", "access.oidc.audience=voicepool"),
    *("access.oidc.jwksUrl=https://issuer.example.com/keys", r"access.oidc.defaultPools={calls/demo,other/*}"),
    *("access.tokenReview.audience=voicepool", "access.corsAllowOrigins={https://a.example.com}"),
    *("access.trustedProxies={10.0.0.0/8}", "access.limits.sessions=7", "access.limits.startsPerMinute=60"),
)
POOL_SECRET = ("livekit.poolSecrets[0].namespace=calls", "livekit.poolSecrets[0].name=other-server")
VARIANTS = [
    (),
    LIVEKIT,
    (
        *LIVEKIT,
        "gateway.service.type=NodePort",
        "gateway.service.nodePort=30080",
        "livekit.publicUrl=wss://example.com",
    ),
    (*LIVEKIT, "watchNamespaces={calls}", "gateway.replicas=1"),
    ("livekit.url=wss://example.com", "livekit.existingSecret=livekit", *POOL_SECRET),
    ("assignment.existingSecret=a", "apiKeys.existingSecret=b"),
    ("crds.install=false", "admissionPolicy.enabled=false", "fullnameOverride=other"),
    CUSTOM_METRICS,
    ACCESS,
    ("tracing.endpoint=https://collector.example.com", "tracing.headersSecret=collector"),
    ("webhook.url=https://example.com/hook", "webhook.existingSecret=hook", "gateway.webClient=true"),
]

Object = dict[str, Any]


@cache
def _program() -> Path:
    return build.programs().helm


@pytest.fixture(scope="module", autouse=True)
def helm() -> Path:
    """The compiled Helm; compiles it where it is not yet."""
    try:
        choose("native", look(os.environ), control_plane_only=True)
    except ClusterError as error:
        pytest.skip(str(error))
    return _program()


def _helm(command: str, *values: str) -> subprocess.CompletedProcess[str]:
    name = ["voicepool"] if command == "template" else []
    arguments = [argument for value in values for argument in ("--set", value)]
    if command == "lint":
        arguments.append("--strict")
    return subprocess.run(
        [_program(), command, *name, CHART, "--namespace", "voicepool", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@cache
def _rendered(*values: str) -> list[Object]:
    done = _helm("template", *values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def _refusal(*values: str) -> str:
    done = _helm("template", *values)
    assert done.returncode != 0, "the chart took it"
    return done.stderr


def _of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def _pod_specs(objects: list[Object]) -> Iterator[Object]:
    for deployment in _of_kind(objects, "Deployment").values():
        yield deployment["spec"]["template"]["spec"]


def _environment(objects: list[Object], component: str) -> dict[str, str]:
    [container] = _of_kind(objects, "Deployment")[component]["spec"]["template"]["spec"]["containers"]
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names))
    # What a pod knows of itself is filled in by the kubelet.
    return {variable["name"]: variable.get("value", "of-the-pod") for variable in container["env"]}


def _rules(objects: list[Object], kind: str, name: str) -> set[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    return {
        (group, resource, tuple(rule["verbs"]), tuple(rule.get("resourceNames", ())))
        for rule in _of_kind(objects, kind)[name]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def _secret_values(objects: list[Object]) -> dict[tuple[str, str], bytes]:
    return {
        (name, key): base64.b64decode(value, validate=True)
        for name, secret in _of_kind(objects, "Secret").items()
        for key, value in secret["data"].items()
    }


@pytest.mark.parametrize("values", VARIANTS, ids=lambda values: " ".join(values) or "defaults")
def test_the_linter_has_no_complaint(values: tuple[str, ...]) -> None:
    done = _helm("lint", *values)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", VARIANTS, ids=lambda values: " ".join(values) or "defaults")
def test_every_pod_is_restricted(values: tuple[str, ...]) -> None:
    specs = list(_pod_specs(_rendered(*values)))
    assert len(specs) == 2
    for spec in specs:
        assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("values", VARIANTS, ids=lambda values: " ".join(values) or "defaults")
def test_no_secret_stands_outside_of_a_secret(values: tuple[str, ...]) -> None:
    objects = _rendered(*values)
    elsewhere = yaml.safe_dump([item for item in objects if item["kind"] != "Secret"])
    for place, value in _secret_values(objects).items():
        if place[1] not in ("url", "public-url", "ca.crt"):
            assert value.decode() not in elsewhere, place
            assert base64.b64encode(value).decode() not in elsewhere, place


def test_the_objects_are_named_after_the_release() -> None:
    objects = _rendered(*LIVEKIT)
    both = {"voicepool-operator", "voicepool-gateway"}
    assert _of_kind(objects, "Deployment").keys() == both
    assert _of_kind(objects, "Service").keys() == both
    assert _of_kind(objects, "ServiceAccount").keys() == both
    assert _of_kind(objects, "Secret").keys() == {
        "voicepool-assignment",
        "voicepool-api-keys",
        "voicepool-first-api-key",
        "voicepool-livekit",
    }
    assert _of_kind(objects, "ConfigMap").keys() == {"voicepool-assignment-public"}


def test_every_selector_finds_the_pods_of_its_own_component_only() -> None:
    objects = _rendered()
    deployments = _of_kind(objects, "Deployment")
    labels = {name: item["spec"]["template"]["metadata"]["labels"] for name, item in deployments.items()}
    selectors = [(name, item["spec"]["selector"]["matchLabels"]) for name, item in deployments.items()]
    selectors += [(name, item["spec"]["selector"]) for name, item in _of_kind(objects, "Service").items()]
    budgets = _of_kind(objects, "PodDisruptionBudget")
    selectors += [(name, item["spec"]["selector"]["matchLabels"]) for name, item in budgets.items()]
    assert len(selectors) == 6
    for name, selector in selectors:
        assert [found for found in labels if selector.items() <= labels[found].items()] == [name]


def test_probes_and_services_name_ports_that_the_containers_have() -> None:
    objects = _rendered()
    for name, deployment in _of_kind(objects, "Deployment").items():
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        ports = {port["name"] for port in container["ports"]}
        [service_port] = _of_kind(objects, "Service")[name]["spec"]["ports"]
        probes = (container["readinessProbe"]["httpGet"]["port"], container["livenessProbe"]["httpGet"]["port"])
        assert {service_port["targetPort"], *probes} <= ports


@pytest.mark.parametrize("values", VARIANTS, ids=lambda values: " ".join(values) or "defaults")
def test_both_processes_understand_their_environment(values: tuple[str, ...]) -> None:
    objects = _rendered(*values)
    name = "other" if "fullnameOverride=other" in values else "voicepool"
    operator = OperatorSettings.from_environment(_environment(objects, f"{name}-operator"))
    gateway = GatewaySettings.from_environment(_environment(objects, f"{name}-gateway"))
    expected = "calls" if "watchNamespaces={calls}" in values else None
    assert operator.namespace == gateway.namespace == expected


def test_every_file_that_a_process_is_told_of_is_mounted() -> None:
    objects = _rendered(*LIVEKIT)
    for name, deployment in _of_kind(objects, "Deployment").items():
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        paths = [value for value in _environment(objects, name).values() if value.startswith("/")]
        assert paths
        for path in paths:
            assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path


def test_more_environment_replaces_what_the_chart_sets() -> None:
    environment = _environment(_rendered("operator.env.VOICEPOOL_LOG_LEVEL=DEBUG"), "voicepool-operator")
    assert environment["VOICEPOOL_LOG_LEVEL"] == "DEBUG"


def test_the_gateway_sends_traces_where_the_values_say_and_to_nobody_otherwise() -> None:
    assert [name for name in _environment(_rendered(), "voicepool-gateway") if name.startswith("OTEL_")] == []
    objects = _rendered("tracing.endpoint=https://collector.example.com", "tracing.headersSecret=collector")
    environment = _environment(objects, "voicepool-gateway")
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "https://collector.example.com"
    assert is_on(environment)
    [container] = _of_kind(objects, "Deployment")["voicepool-gateway"]["spec"]["template"]["spec"]["containers"]
    (headers,) = (one for one in container["env"] if one["name"] == "OTEL_EXPORTER_OTLP_HEADERS")
    assert headers["valueFrom"] == {"secretKeyRef": {"name": "collector", "key": "headers"}}


def test_the_gateway_is_open_to_those_whom_the_values_name() -> None:
    read = GatewaySettings.from_environment(_environment(_rendered(*ACCESS), "voicepool-gateway"))
    assert (read.oidc_issuer, read.oidc_audience) == ("https://issuer.example.com", "voicepool")
    assert (read.oidc_jwks_url, read.oidc_default_pools) == (
        "https://issuer.example.com/keys",
        ("calls/demo", "other/*"),
    )
    assert (read.token_review_audience, read.cors_allow_origins) == ("voicepool", ("https://a.example.com",))
    assert (read.trusted_proxies, read.sessions_per_caller, read.starts_per_minute) == (("10.0.0.0/8",), 7, 60)
    closed = GatewaySettings.from_environment(_environment(_rendered(), "voicepool-gateway"))
    assert (closed.oidc_issuer, closed.token_review_audience, closed.cors_allow_origins) == (None, None, ())


def test_the_gateway_may_review_tokens_only_where_it_takes_them() -> None:
    name = "voicepool-voicepool-gateway-reviews"
    assert name not in _of_kind(_rendered(), "ClusterRole")
    assert {
        (rule["resources"][0], *rule["verbs"]) for rule in _of_kind(_rendered(*ACCESS), "ClusterRole")[name]["rules"]
    } == {
        ("tokenreviews", "create"),
        ("subjectaccessreviews", "create"),
    }


def test_webhooks_are_signed_with_the_secret_that_is_named_and_with_none_there_are_none() -> None:
    values = ("webhook.url=https://example.com/hook", "webhook.existingSecret=hook")
    objects = _rendered(*values)
    settings = OperatorSettings.from_environment(_environment(objects, "voicepool-operator"))
    assert settings.webhook_url == "https://example.com/hook"
    spec = _of_kind(objects, "Deployment")["voicepool-operator"]["spec"]["template"]["spec"]
    (volume,) = (one for one in spec["volumes"] if one["name"] == "webhook")
    assert volume["secret"] == {"secretName": "hook", "items": [{"key": "secret", "path": "secret"}]}
    (mount,) = (one for one in spec["containers"][0]["volumeMounts"] if one["name"] == "webhook")
    assert str(settings.webhook_secret_file) == f"{mount['mountPath']}/secret"
    assert OperatorSettings.from_environment(_environment(_rendered(), "voicepool-operator")).webhook_url is None
    assert "webhook.existingSecret" in _refusal(values[0])


def test_the_web_client_is_served_where_it_is_asked_for() -> None:
    def settings(*values: str) -> GatewaySettings:
        return GatewaySettings.from_environment(_environment(_rendered(*values), "voicepool-gateway"))

    assert not settings().web_client
    assert settings("gateway.webClient=true").web_client


def test_the_operator_may_do_what_it_does_and_no_more() -> None:
    assert _rules(_rendered(), "ClusterRole", "voicepool-voicepool-operator") == {
        ("voicepool.dev", "voiceagentpools", ("get", "list", "watch"), ()),
        ("voicepool.dev", "voiceagentpools/status", ("patch",), ()),
        ("", "pods", ("get", "list", "watch", "create", "patch", "delete"), ()),
        ("policy", "poddisruptionbudgets", ("get", "list", "watch", "create", "patch", "delete"), ()),
        ("events.k8s.io", "events", ("create",), ()),
    }


def test_the_gateway_may_do_what_it_does_and_no_more() -> None:
    assert _rules(_rendered(), "ClusterRole", "voicepool-voicepool-gateway") == {
        ("voicepool.dev", "voiceagentpools", ("get", "list", "watch"), ()),
        ("", "pods", ("get", "list", "watch", "create", "patch", "delete"), ()),
        ("", "pods/log", ("get",), ()),
    }


def test_the_gateway_reads_the_secrets_that_are_listed_and_no_other() -> None:
    objects = _rendered(*POOL_SECRET)
    rules = _rules(objects, "Role", "voicepool-livekit-other-server")
    assert rules == {("", "secrets", ("get",), ("other-server",))}
    role = _of_kind(objects, "Role")["voicepool-livekit-other-server"]
    binding = _of_kind(objects, "RoleBinding")["voicepool-livekit-other-server"]
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "calls"
    assert [subject["name"] for subject in binding["subjects"]] == ["voicepool-gateway"]
    assert "secrets" not in yaml.safe_dump(list(_of_kind(objects, "ClusterRole").values()))


def test_one_namespace_needs_no_right_in_the_cluster() -> None:
    objects = _rendered("watchNamespaces={calls}")
    assert {item["kind"] for item in objects if item["kind"].startswith("Cluster")} == set()
    for kind in ("Role", "RoleBinding"):
        found = _of_kind(objects, kind)
        for own in ("voicepool-operator-lease", "voicepool-gateway-peers"):
            assert found.pop(own)["metadata"]["namespace"] == "voicepool"
        assert found.keys() == {"voicepool-operator", "voicepool-gateway"}
        assert {item["metadata"]["namespace"] for item in found.values()} == {"calls"}
    everywhere = _rules(_rendered(), "ClusterRole", "voicepool-voicepool-operator")
    assert _rules(objects, "Role", "voicepool-operator") == everywhere


def test_every_binding_ties_an_account_to_the_role_of_its_name() -> None:
    for values, prefix in (((), "Cluster"), (("watchNamespaces={calls}",), "")):
        bindings = _of_kind(_rendered(*values), f"{prefix}RoleBinding")
        for own in ("voicepool-operator-lease", "voicepool-gateway-peers"):
            bindings.pop(own, None)
        assert len(bindings) == 2
        for name, binding in bindings.items():
            account = f"voicepool-{name.rpartition('-')[2]}"
            assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (f"{prefix}Role", name)
            assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "voicepool"}]


def test_the_admission_policy_is_about_the_account_of_the_gateway() -> None:
    objects = _rendered()
    [policy] = _of_kind(objects, "ValidatingAdmissionPolicy").values()
    [account] = {
        spec["serviceAccountName"] for spec in _pod_specs(objects) if spec["containers"][0]["name"] == "gateway"
    }
    [condition] = policy["spec"]["matchConditions"]
    assert condition["expression"] == f"request.userInfo.username == 'system:serviceaccount:voicepool:{account}'"
    assert all(validation["message"] for validation in policy["spec"]["validations"])
    [binding] = _of_kind(objects, "ValidatingAdmissionPolicyBinding").values()
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}


def test_the_custom_resource_definition_is_the_generated_one() -> None:
    generated = (ROOT / "crds" / crd.FILE_NAME).read_text()
    [rendered] = _of_kind(_rendered(), "CustomResourceDefinition").values()
    assert rendered["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    del rendered["metadata"]["labels"]
    assert rendered == yaml.safe_load(generated)


def test_the_custom_resource_definition_can_be_left_out_or_left_to_helm() -> None:
    assert not _of_kind(_rendered("crds.install=false"), "CustomResourceDefinition")
    [definition] = _of_kind(_rendered("crds.keep=false"), "CustomResourceDefinition").values()
    assert "annotations" not in definition["metadata"]


def test_the_private_key_and_the_certificate_are_a_pair() -> None:
    objects = _rendered()
    private = load_pem_private_key(_secret_values(objects)["voicepool-assignment", "private.pem"], password=None)
    published = _of_kind(objects, "ConfigMap")["voicepool-assignment-public"]["data"]["certificate.pem"]
    public = x509.load_pem_x509_certificate(published.encode()).public_key()
    assert isinstance(private, Ed25519PrivateKey)
    assert isinstance(public, Ed25519PublicKey)
    public.verify(private.sign(b"an assignment"), b"an assignment")


def test_only_the_gateway_gets_the_private_key() -> None:
    for spec in _pod_specs(_rendered()):
        secrets = [volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume]
        assert ("voicepool-assignment" in secrets) == (spec["containers"][0]["name"] == "gateway")


def test_both_deployments_follow_a_new_key_pair() -> None:
    sums = {
        deployment["spec"]["template"]["metadata"]["annotations"]["checksum/assignment"]
        for deployment in _of_kind(_rendered(), "Deployment").values()
    }
    assert len(sums) == 1
    other = [
        deployment["spec"]["template"]["metadata"]["annotations"]["checksum/assignment"]
        for deployment in _of_kind(_rendered("gateway.replicas=3"), "Deployment").values()
    ]
    assert sums.isdisjoint(other)


def test_the_gateway_gets_the_hash_of_the_first_api_key_and_never_the_key() -> None:
    objects = _rendered()
    values = _secret_values(objects)
    key = values["voicepool-first-api-key", "api-key"]
    assert len(key.removeprefix(b"vp_")) == 40
    assert values["voicepool-api-keys", "default"] == b"sha256:" + hashlib.sha256(key).hexdigest().encode()
    assert "first-api-key" not in yaml.safe_dump(list(_pod_specs(objects)))


def test_keys_of_ones_own_replace_the_generated_ones() -> None:
    objects = _rendered("assignment.existingSecret=own-pair", "apiKeys.existingSecret=own-keys")
    assert not _of_kind(objects, "Secret")
    assert not _of_kind(objects, "ConfigMap")
    mounted = {
        spec["containers"][0]["name"]: {
            volume["secret"]["secretName"]: [item["key"] for item in volume["secret"].get("items", ())]
            for volume in spec["volumes"]
            if "secret" in volume
        }
        for spec in _pod_specs(objects)
    }
    assert mounted == {
        "operator": {"own-pair": ["public.pem"]},
        "gateway": {"own-pair": ["private.pem"], "own-keys": []},
    }


def test_the_livekit_secret_has_the_files_that_the_gateway_reads() -> None:
    values = _secret_values(_rendered(*LIVEKIT, "livekit.publicUrl=wss://example.com"))
    assert {key: value.decode() for (name, key), value in values.items() if name == "voicepool-livekit"} == {
        "url": "ws://192.0.2.1:7880",
        "public-url": "wss://example.com",
        "api-key": "devkey",
        "api-secret": "a-secret-nobody-guesses",
    }


def test_an_existing_livekit_secret_brings_the_keys_and_the_url_may_come_from_the_values() -> None:
    objects = _rendered("livekit.url=wss://example.com", "livekit.existingSecret=mine")
    assert _of_kind(objects, "Secret")["voicepool-livekit"]["data"].keys() == {"url"}
    [gateway] = [spec for spec in _pod_specs(objects) if spec["containers"][0]["name"] == "gateway"]
    [volume] = [volume for volume in gateway["volumes"] if volume["name"] == "livekit"]
    assert [source["secret"]["name"] for source in volume["projected"]["sources"]] == ["mine", "voicepool-livekit"]


@pytest.mark.parametrize(
    ("values", "image"),
    [
        (("image.repository=example.com/v",), "example.com/v:0.1.0"),
        (("image.repository=example.com/v", "image.tag=dev"), "example.com/v:dev"),
        (("image.repository=example.com/v", "image.tag=1234567"), "example.com/v:1234567"),
        (
            ("image.repository=example.com/v", "image.tag=dev", "image.digest=sha256:" + "0" * 64),
            f"example.com/v@sha256:{'0' * 64}",
        ),
    ],
)
def test_the_image_is_named_by_digest_or_tag(values: tuple[str, ...], image: str) -> None:
    assert {spec["containers"][0]["image"] for spec in _pod_specs(_rendered(*values))} == {image}


def test_the_node_port_is_the_one_asked_for() -> None:
    objects = _rendered("gateway.service.type=NodePort", "gateway.service.nodePort=30080")
    service = _of_kind(objects, "Service")["voicepool-gateway"]["spec"]
    assert (service["type"], service["ports"][0]["nodePort"]) == ("NodePort", 30080)


@pytest.mark.parametrize("component", ["operator", "gateway"])
def test_a_single_one_has_no_disruption_budget(component: str) -> None:
    name = f"voicepool-{component}"
    assert _of_kind(_rendered(), "PodDisruptionBudget")[name]["spec"]["minAvailable"] == 1
    assert name not in _of_kind(_rendered(f"{component}.replicas=1"), "PodDisruptionBudget")


def test_two_operators_share_one_lease_and_have_names_of_their_own_in_it() -> None:
    objects = _rendered()
    deployment = _of_kind(objects, "Deployment")["voicepool-operator"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (2, "RollingUpdate")
    environment = _environment(objects, "voicepool-operator")
    assert environment["VOICEPOOL_LEASE_NAME"] == "voicepool-operator"
    assert environment["VOICEPOOL_LEASE_NAMESPACE"] == "voicepool"
    [identity] = [
        variable["valueFrom"]["fieldRef"]["fieldPath"]
        for variable in deployment["template"]["spec"]["containers"][0]["env"]
        if variable["name"] == "VOICEPOOL_LEASE_IDENTITY"
    ]
    assert identity == "metadata.name"


@pytest.mark.parametrize("values", [(), ("watchNamespaces={calls}",)])
def test_the_operator_may_hold_its_own_lease_and_no_other(values: tuple[str, ...]) -> None:
    objects = _rendered(*values)
    assert _rules(objects, "Role", "voicepool-operator-lease") == {
        ("coordination.k8s.io", "leases", ("get", "patch"), ("voicepool-operator",)),
        ("coordination.k8s.io", "leases", ("create",), ()),
    }
    role = _of_kind(objects, "Role")["voicepool-operator-lease"]
    binding = _of_kind(objects, "RoleBinding")["voicepool-operator-lease"]
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "voicepool"
    assert [subject["name"] for subject in binding["subjects"]] == ["voicepool-operator"]


@pytest.mark.parametrize("values", [(), ("watchNamespaces={calls}",)])
def test_the_gateways_find_each_other_through_their_own_service(values: tuple[str, ...]) -> None:
    objects = _rendered(*values)
    environment = _environment(objects, "voicepool-gateway")
    service = _of_kind(objects, "Service")[environment["VOICEPOOL_PEERS_SERVICE"]]
    assert service["metadata"]["namespace"] == environment["VOICEPOOL_PEERS_NAMESPACE"] == "voicepool"
    assert [port["name"] for port in service["spec"]["ports"]] == [PORT_NAME]
    assert _rules(objects, "Role", "voicepool-gateway-peers") == {("discovery.k8s.io", "endpointslices", ("list",), ())}
    [subject] = _of_kind(objects, "RoleBinding")["voicepool-gateway-peers"]["subjects"]
    assert subject["name"] == "voicepool-gateway"


def test_custom_metrics_are_off_unless_somebody_wants_them() -> None:
    objects = _rendered()
    assert not _of_kind(objects, "APIService")
    assert "custom-metrics" not in yaml.safe_dump(
        [item for item in objects if item["kind"] != "CustomResourceDefinition"]
    )


def test_custom_metrics_are_served_by_the_gateway_with_a_certificate_that_the_api_server_is_told_of() -> None:
    objects = _rendered(*CUSTOM_METRICS)
    [api] = _of_kind(objects, "APIService").values()
    assert api["metadata"]["name"] == f"{API_VERSION}.{API_GROUP}"
    assert "insecureSkipTLSVerify" not in api["spec"]
    service = _of_kind(objects, "Service")[api["spec"]["service"]["name"]]
    assert service["spec"]["selector"] == _of_kind(objects, "Service")["voicepool-gateway"]["spec"]["selector"]
    [container] = _of_kind(objects, "Deployment")["voicepool-gateway"]["spec"]["template"]["spec"]["containers"]
    port = {port["name"]: port["containerPort"] for port in container["ports"]}[
        service["spec"]["ports"][0]["targetPort"]
    ]
    settings = GatewaySettings.from_environment(_environment(objects, "voicepool-gateway"))
    assert settings.custom_metrics_port == port
    assert str(settings.custom_metrics_folder) in [mount["mountPath"] for mount in container["volumeMounts"]]
    values = _secret_values(objects)
    certificate = x509.load_pem_x509_certificate(values["voicepool-custom-metrics", "tls.crt"])
    authority = x509.load_pem_x509_certificate(base64.b64decode(api["spec"]["caBundle"]))
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["voicepool-custom-metrics.voicepool.svc"]
    key = load_pem_private_key(values["voicepool-custom-metrics", "tls.key"], password=None)
    assert key.public_key() == certificate.public_key()


def test_custom_metrics_give_the_gateway_one_right_more_to_recognise_the_api_server() -> None:
    plain, more = _rendered(), _rendered(*CUSTOM_METRICS)
    name = "voicepool-voicepool-gateway"
    assert _rules(more, "ClusterRole", name) == _rules(plain, "ClusterRole", name)
    new = _of_kind(more, "RoleBinding").keys() - _of_kind(plain, "RoleBinding").keys()
    [binding] = [_of_kind(more, "RoleBinding")[found] for found in new]
    assert binding["metadata"]["namespace"] == "kube-system"
    assert binding["roleRef"]["name"] == "extension-apiserver-authentication-reader"
    assert [subject["name"] for subject in binding["subjects"]] == ["voicepool-gateway"]


def test_a_certificate_of_ones_own_replaces_the_generated_one() -> None:
    pem = "-----BEGIN CERTIFICATE-----x"
    own = ("customMetrics.existingSecret=own", f"customMetrics.caBundle={pem}")
    objects = _rendered(*CUSTOM_METRICS, *own)
    assert "voicepool-custom-metrics" not in _of_kind(objects, "Secret")
    [api] = _of_kind(objects, "APIService").values()
    assert base64.b64decode(api["spec"]["caBundle"]).decode() == pem
    volumes = next(spec["volumes"] for spec in _pod_specs(objects) if spec["containers"][0]["name"] == "gateway")
    assert [volume["secret"]["secretName"] for volume in volumes if volume["name"] == "custom-metrics"] == ["own"]
    assert "belong together" in _refusal(*CUSTOM_METRICS, own[0])


def test_custom_metrics_are_not_installed_unseen() -> None:
    refusal = _refusal("customMetrics.enabled=true")
    assert "rendered without a cluster" in refusal
    assert "customMetrics.force=true" in refusal


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (("gatway.replicas=3",), "gatway"),
        (("gateway.replica=3",), "replica"),
        (("gateway.replicas=-1",), "/gateway/replicas"),
        (("livekit.apikey=x",), "apikey"),
        (("livekit.url=livekit.example.com",), "/livekit/url"),
        (("tracing.endpoint=collector:4317",), "/tracing/endpoint"),
        (("webhook.url=ftp://example.com",), "/webhook/url"),
        (("image.digest=latest",), "/image/digest"),
        (("gateway.service.type=External",), "/gateway/service/type"),
        (("watchNamespaces={calls,more}",), "/watchNamespaces"),
        (("generated.firstApiKey=x",), "generated"),
    ],
)
def test_the_schema_refuses_a_wrong_value_and_names_it(values: tuple[str, ...], word: str) -> None:
    refusal = _refusal(*values)
    assert "values don't meet the specifications of the schema" in refusal
    assert word in refusal


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("livekit.url=ws://x", "livekit.apiKey=a"), "livekit.apiKey and livekit.apiSecret belong together"),
        (("livekit.apiKey=a", "livekit.apiSecret=b"), "livekit.url is missing"),
        ((*LIVEKIT, "livekit.existingSecret=a"), "set one or the other"),
    ],
)
def test_values_that_contradict_each_other_are_refused_in_words(values: tuple[str, ...], words: str) -> None:
    assert words in _refusal(*values)
