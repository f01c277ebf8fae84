"""The network of a cluster.

A namespace of its own, one link between it and the host, and the rules that let pods reach the outside.

Cluster number i has the link `voicepool<i>` (host end, 10.213.i.1) with the node at 10.213.i.2, and pods in
10.214.i.0/24. The host end carries the cluster's name as its alias and every iptables rule as a comment: so they are
found again when all records are lost.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.native.commands import run, succeeds
from tests.cluster.native.processes import boot_id

_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_FORWARDING_NOTE = "voicepool-forwarding-was-off"
_LINK_PREFIX = "voicepool"
_TABLES = ("nat", "filter")


@dataclass(frozen=True, slots=True)
class Addresses:
    """What cluster number `index` uses."""

    index: int

    @property
    def link(self) -> str:
        """Name of the host's end of the link."""
        return f"{_LINK_PREFIX}{self.index}"

    @property
    def host(self) -> str:
        """The host's address on the link."""
        return f"10.213.{self.index}.1"

    @property
    def node(self) -> str:
        """The node's address."""
        return f"10.213.{self.index}.2"

    @property
    def link_cidr(self) -> str:
        """The network of the link."""
        return f"10.213.{self.index}.0/24"

    @property
    def pod_cidr(self) -> str:
        """The network of the pods."""
        return f"10.214.{self.index}.0/24"


def free_addresses(used: Iterable[str]) -> Addresses:
    """The first addresses that overlap with none of the networks (or addresses) in `used`.

    Raises:
        ClusterError: all are taken.
    """
    taken = [ipaddress.ip_network(text, strict=False) for text in used]
    for index in range(256):
        addresses = Addresses(index)
        mine = [ipaddress.ip_network(text) for text in (addresses.link_cidr, addresses.pod_cidr)]
        if not any(one.version == 4 and one.overlaps(other) for one in taken for other in mine):
            return addresses
    raise ClusterError("all networks 10.213.0.0/24 to 10.213.255.0/24 are in use", "take another cluster down first")


def routed_networks(routes: str) -> list[str]:
    """Destinations in the output of `ip -json route`, without the default route."""
    return [route["dst"] for route in json.loads(routes or "[]") if route.get("dst") not in (None, "default")]


def rules(addresses: Addresses, name: str) -> list[tuple[str, str, list[str]]]:
    """The host's iptables rules of a cluster: table, chain and the rest."""
    comment = ["-m", "comment", "--comment", _mark(name)]
    link = addresses.link
    return [
        ("nat", "POSTROUTING", ["-s", addresses.link_cidr, "!", "-o", link, *comment, "-j", "MASQUERADE"]),
        ("filter", "FORWARD", ["-i", link, *comment, "-j", "ACCEPT"]),
        ("filter", "FORWARD", ["-o", link, *comment, "-j", "ACCEPT"]),
    ]


def _mark(name: str) -> str:
    return f"voicepool-{name}"


def marked_rules(saved: str, name: str) -> list[list[str]]:
    """The rules of a cluster in the output of `iptables -S`, as arguments of the command that deletes them."""
    found = []
    for line in saved.splitlines():
        words = shlex.split(line)
        if words[:1] == ["-A"] and _mark(name) in words:
            found.append(["-D", *words[1:]])
    return found


def create(name: str, namespace: Path) -> Addresses:
    """Makes namespace and link. The caller holds the lock of all clusters: no two may take the same addresses.

    Raises:
        ClusterError: a step failed; what was made is left for `remove`.
    """
    addresses = free_addresses(routed_networks(run("ip", "-json", "-4", "route", "show", "table", "all")))
    namespace.touch()
    run("unshare", f"--net={namespace}", "true", do="it needs root and a kernel with network namespaces")
    # The far end is called eth0, as in any container.
    run("ip", "link", "add", addresses.link, "type", "veth", "peer", "name", "eth0", "netns", str(namespace))
    run("ip", "link", "set", addresses.link, "alias", _mark(name), "up")
    run("ip", "address", "add", f"{addresses.host}/24", "dev", addresses.link)
    inside = ("nsenter", f"--net={namespace}", "--")
    run(*inside, "ip", "link", "set", "lo", "up")
    run(*inside, "ip", "address", "add", f"{addresses.node}/24", "dev", "eth0")
    run(*inside, "ip", "link", "set", "eth0", "up")
    run(*inside, "ip", "route", "add", "default", "via", addresses.host)
    run(*inside, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    run("ip", "route", "add", addresses.pod_cidr, "via", addresses.node)
    return addresses


def let_out(addresses: Addresses, name: str, notes: Path) -> None:
    """Lets pods reach what the host reaches; notes down in the folder `notes` when the host forwarded nothing before.

    Raises:
        ClusterError: iptables failed.
    """
    for table, chain, rest in rules(addresses, name):
        run("iptables", "-w", "10", "-t", table, "-I", chain, *rest)
    if _FORWARDING.read_text().strip() == "0":
        # The boot as well: after another one the setting is the machine's own again.
        (notes / _FORWARDING_NOTE).write_text(boot_id())
        _FORWARDING.write_text("1\n")


def links_of(listing: str, name: str) -> list[str]:
    """The links of a cluster in the output of `ip -json link`."""
    return [link["ifname"] for link in json.loads(listing or "[]") if link.get("ifalias") == _mark(name)]


def other_clusters(listing: str, name: str) -> bool:
    """Whether `ip -json link` shows a link of another cluster."""
    aliases = [str(link.get("ifalias", "")) for link in json.loads(listing or "[]")]
    return any(alias.startswith("voicepool-") and alias != _mark(name) for alias in aliases)


def remove(name: str, notes: Path) -> None:
    """Removes the link and the rules of a cluster, found by its name. The namespace goes with its file (a mount).

    With the last cluster the host's forwarding is set back, if the folder `notes` says that it was off.
    """
    for table in _TABLES:
        if succeeds("iptables", "-w", "10", "-t", table, "-S"):
            for rule in marked_rules(run("iptables", "-w", "10", "-t", table, "-S"), name):
                run("iptables", "-w", "10", "-t", table, *rule)
    listing = run("ip", "-json", "link", "show")
    for link in links_of(listing, name):
        try:
            run("ip", "link", "delete", link)
        except ClusterError:
            # The kernel takes the pair away by itself when the namespace at its other end has gone, at a moment of its own.
            if link in links_of(run("ip", "-json", "link", "show"), name):
                raise
    note = notes / _FORWARDING_NOTE
    if note.exists() and not other_clusters(listing, name):
        if note.read_text() == boot_id():
            _FORWARDING.write_text("0\n")
        note.unlink()
