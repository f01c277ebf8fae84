"""Command lines and configuration files of the components. Pure: facts in, text out."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.cluster.native.certificates import KeyPair
from tests.cluster.native.layout import Layout
from tests.cluster.native.processes import Component

SERVICE_CIDR = "10.96.0.0/16"
FIRST_SERVICE_ADDRESS = "10.96.0.1"
PAUSE_IMAGE = "localhost/pause:1"


@dataclass(frozen=True, slots=True)
class Plan:
    """What `up` decided about a cluster.

    Attributes:
        layout: its paths.
        programs: folder of the compiled programs.
        node_address: where the API server (and the node) is reached.
        api_port: port of the API server.
        etcd_port: port of etcd, on loopback.
        etcd_peer_port: etcd listens there too, on loopback, for nobody.
        pod_cidr: addresses of pods; empty where there is no node.
        cni_plugins: folder of the CNI plugins.
        snapshotter: how containerd stacks image layers.
        resolver: file with the name servers that pods get; empty for none.
    """

    layout: Layout
    programs: Path
    node_address: str
    api_port: int
    etcd_port: int
    etcd_peer_port: int
    pod_cidr: str = ""
    cni_plugins: str = ""
    snapshotter: str = "overlayfs"
    resolver: str = ""

    @property
    def has_node(self) -> bool:
        """Whether pods run."""
        return bool(self.pod_cidr)

    @property
    def node_name(self) -> str:
        """The node's name."""
        return f"{self.layout.name}-node"

    @property
    def server(self) -> str:
        """URL of the API server."""
        return f"https://{self.node_address}:{self.api_port}"

    @property
    def network_namespace(self) -> str:
        """File of the network namespace, empty without a node."""
        return str(self.layout.network_namespace) if self.has_node else ""


def kubeconfig(context: str, server: str, authority: bytes, user: KeyPair) -> str:
    """A kubeconfig that holds everything itself, so it can be copied."""

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    cluster = {"server": server, "certificate-authority-data": text(authority)}
    credentials = {"client-certificate-data": text(user.certificate), "client-key-data": text(user.key)}
    return _yaml(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": context, "cluster": cluster}],
            "users": [{"name": context, "user": credentials}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
            "current-context": context,
        }
    )


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False)


def audit_policy() -> str:
    """What the API server writes down: who did what, and whole bodies where pods or pools are changed.

    Never the body of a Secret.
    """
    return _yaml(
        {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "omitManagedFields": True,
            "rules": [
                {"level": "None", "users": ["system:apiserver", "system:kube-scheduler", "system:kube-proxy"]},
                {"level": "None", "userGroups": ["system:nodes"], "verbs": ["get", "list", "watch"]},
                {"level": "None", "users": ["system:kube-controller-manager"], "verbs": ["get", "list", "watch"]},
                {"level": "None", "nonResourceURLs": ["/livez*", "/readyz*", "/healthz*", "/openapi/*"]},
                {
                    "level": "RequestResponse",
                    "verbs": ["create", "update", "patch", "delete", "deletecollection"],
                    "resources": [
                        {"group": "", "resources": ["pods", "pods/status", "pods/eviction"]},
                        {"group": "voicepool.dev"},
                    ],
                },
                {"level": "Metadata"},
            ],
        }
    )


def containerd(plan: Plan) -> str:
    """Configuration of containerd: everything of the cluster in the cluster's own folders."""
    layout = plan.layout
    return f"""version = 2
root = "{layout.data}/containerd"
state = "{layout.containerd_state}"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{layout.containerd_socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE a process may not be made less likely to be killed than the one that starts it.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plan.cni_plugins}"
    conf_dir = "{layout.configuration}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{plan.snapshotter}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""


def cni(plan: Plan) -> dict[str, Any]:
    """The pods' network.

    Each pod has a link of its own to the node, so that all its traffic passes the node's iptables.

    A bridge would need the kernel module br_netfilter for a pod to reach a Service whose pod sits on the same bridge.
    """
    return {
        "cniVersion": "0.4.0",
        "name": f"voicepool-{plan.layout.name}",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": f"{plan.layout.data}/cni",
                    "ranges": [[{"subnet": plan.pod_cidr}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def kubelet(plan: Plan) -> str:
    """Configuration of the kubelet, for cgroup v1 and v2."""
    pki = plan.layout.pki
    return _yaml(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": f"{pki}/ca.crt"},
                "webhook": {"enabled": True},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{pki}/kubelet.crt",
            "tlsPrivateKeyFile": f"{pki}/kubelet.key",
            "address": "0.0.0.0",
            "containerRuntimeEndpoint": f"unix://{plan.layout.containerd_socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{plan.layout.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "localStorageCapacityIsolation": False,
            "evictionHard": {"memory.available": "100Mi"},
            # Images are loaded by hand: one that is collected could not be pulled again.
            "imageGCHighThresholdPercent": 100,
            "podLogsDir": f"{plan.layout.data}/pod-logs",
            "volumePluginDir": f"{plan.layout.data}/volume-plugins",
            "resolvConf": plan.resolver,
            "maxPods": 250,
            "podPidsLimit": -1,
            "kubeAPIQPS": 100,
            "kubeAPIBurst": 200,
            "registryPullQPS": 0,
            "eventRecordQPS": 0,
        }
    )


def kube_proxy(plan: Plan) -> str:
    """Configuration of kube-proxy."""
    return _yaml(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": f"{plan.layout.pki}/kube-proxy.kubeconfig"},
            "mode": "iptables",
            "clusterCIDR": plan.pod_cidr,
            "hostnameOverride": plan.node_name,
            # The limit is the machine's, not a network namespace's.
            "conntrack": {"maxPerCore": 0, "min": 0},
            "nodePortAddresses": ["primary"],
        }
    )


def _component(plan: Plan, name: str, *arguments: str) -> Component:
    return Component(name, (str(plan.programs / name), *arguments), plan.network_namespace)


def etcd(plan: Plan) -> Component:
    """etcd, on loopback, its data in memory."""
    client, peer = f"http://127.0.0.1:{plan.etcd_port}", f"http://127.0.0.1:{plan.etcd_peer_port}"
    return _component(
        plan,
        "etcd",
        f"--data-dir={plan.layout.memory}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
    )


def kube_apiserver(plan: Plan) -> Component:
    """The API server with Node authorization, RBAC and an audit log."""
    layout, pki = plan.layout, plan.layout.pki
    own = (
        # Its own Endpoints may not name a loopback address; with a node, pods reach the API through them.
        ("--bind-address=0.0.0.0", f"--advertise-address={plan.node_address}")
        if plan.has_node
        else ("--bind-address=127.0.0.1", "--endpoint-reconciler-type=none")
    )
    return _component(
        plan,
        "kube-apiserver",
        *own,
        f"--secure-port={plan.api_port}",
        f"--etcd-servers=http://127.0.0.1:{plan.etcd_port}",
        f"--tls-cert-file={pki}/kube-apiserver.crt",
        f"--tls-private-key-file={pki}/kube-apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/service-account.pub",
        f"--service-account-signing-key-file={pki}/service-account.key",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--kubelet-client-certificate={pki}/kube-apiserver-client.crt",
        f"--kubelet-client-key={pki}/kube-apiserver-client.key",
        # Logs and exec would look the node's name up in DNS.
        "--kubelet-preferred-address-types=InternalIP",
        f"--requestheader-client-ca-file={pki}/ca.crt",
        # One authority for clients and for the front proxy: only this name may speak for others.
        "--requestheader-allowed-names=kube-apiserver-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki}/kube-apiserver-client.crt",
        f"--proxy-client-key-file={pki}/kube-apiserver-client.key",
        "--enable-aggregator-routing=true",
        f"--audit-policy-file={layout.configuration}/audit-policy.yaml",
        f"--audit-log-path={layout.audit_log}",
        "--shutdown-send-retry-after=false",
    )


def kube_controller_manager(plan: Plan) -> Component:
    """The controllers, service accounts and garbage collection among them."""
    pki = plan.layout.pki
    node = (f"--cluster-cidr={plan.pod_cidr}",) if plan.has_node else ("--secure-port=0",)
    return _component(
        plan,
        "kube-controller-manager",
        *node,
        f"--kubeconfig={pki}/kube-controller-manager.kubeconfig",
        f"--service-account-private-key-file={pki}/service-account.key",
        f"--root-ca-file={pki}/ca.crt",
        f"--cluster-signing-cert-file={pki}/ca.crt",
        f"--cluster-signing-key-file={pki}/ca.key",
        "--use-service-account-credentials",
        "--leader-elect=false",
        # Default 15 s: a test would wait for nothing else.
        "--horizontal-pod-autoscaler-sync-period=1s",
        # Each controller fetches a token at the start; at the default rate that alone takes five seconds.
        "--kube-api-qps=200",
        "--kube-api-burst=400",
    )


def kube_scheduler(plan: Plan) -> Component:
    """The scheduler."""
    return _component(
        plan, "kube-scheduler", f"--kubeconfig={plan.layout.pki}/kube-scheduler.kubeconfig", "--leader-elect=false"
    )


def kubelet_component(plan: Plan) -> Component:
    """The kubelet."""
    return _component(
        plan,
        "kubelet",
        f"--config={plan.layout.configuration}/kubelet.yaml",
        f"--kubeconfig={plan.layout.pki}/kubelet.kubeconfig",
        f"--hostname-override={plan.node_name}",
        f"--node-ip={plan.node_address}",
        f"--root-dir={plan.layout.data}/kubelet",
    )


def kube_proxy_component(plan: Plan) -> Component:
    """kube-proxy."""
    return _component(plan, "kube-proxy", f"--config={plan.layout.configuration}/kube-proxy.yaml")


def containerd_component(plan: Plan, program: str) -> Component:
    """containerd; `program` is its absolute path."""
    command = (program, "--config", f"{plan.layout.configuration}/containerd.toml")
    return Component("containerd", command, plan.network_namespace)
