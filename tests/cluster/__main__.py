"""`python -m tests.cluster`: a Kubernetes for tests and for the demo, made on this machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tests.cluster.errors import ClusterError
from tests.cluster.progress import Progress, words
from tests.cluster.providers import PROVIDERS, look
from tests.cluster.tool import DEFAULT_NAME, Cluster, open_cluster


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default=DEFAULT_NAME, help="the cluster's name (default: %(default)s)")
    common.add_argument(
        "--provider", choices=PROVIDERS, default="auto", help="who makes it (default: chosen, and said)"
    )
    common.add_argument("--control-plane-only", action="store_true", help="the API alone: no node, no root")
    common.add_argument("--kubeconfig", default="", help="an existing cluster: its kubeconfig")
    common.add_argument("--context", default="", help="an existing cluster: its context")
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    add("up", "bring the cluster up")
    add("down", "remove the cluster and every trace of it")
    add("status", "say what runs; exit code 1 when the cluster does not")
    add("kubeconfig", "print the path of the kubeconfig")
    add("load", "give images to the node").add_argument("images", nargs="+", metavar="IMAGE")
    add("logs", "print the log of a component").add_argument("component")
    for client in ("kubectl", "helm"):
        add(client, f"run {client} on the cluster; its arguments come after --")
    return parser


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what comes after `--`."""
    words_given = list(arguments)
    if "--" not in words_given:
        return words_given, []
    at = words_given.index("--")
    return words_given[:at], words_given[at + 1 :]


def _status(cluster: Cluster) -> int:
    running = cluster.running()
    print(f"{cluster.name} ({cluster.provider}): {'running' if running else 'not running'}")
    for component, alive in cluster.components().items():
        print(f"  {component:<26}{'runs, process ' + str(cluster.component_pid(component)) if alive else 'ended'}")
    if running:
        print(f"  kubeconfig                {cluster.kubeconfig}")
        print(f"  node address              {cluster.node_address}")
    return 0 if running else 1


def _up(cluster: Cluster, progress: Progress) -> None:
    if cluster.up():
        progress.say(f"the cluster {cluster.name!r} is up ({words(progress.elapsed_seconds)} in all)")
    else:
        progress.say(f"the cluster {cluster.name!r} runs already")
    print(f"export KUBECONFIG={cluster.kubeconfig}")


def _run(arguments: argparse.Namespace, rest: list[str]) -> int:
    progress = Progress()
    cluster = open_cluster(
        arguments.name,
        arguments.provider,
        # Only `up` makes a difference between the two; the others find out.
        arguments.control_plane_only or (arguments.command != "up" and os.geteuid() != 0),
        look(os.environ, arguments.kubeconfig, arguments.context),
        progress,
        (lambda reason: progress.say(f"cluster by {reason}")) if arguments.command == "up" else (lambda reason: None),
    )
    match arguments.command:
        case "up":
            _up(cluster, progress)
        case "down":
            progress.say(
                f"{cluster.name!r} is gone" if cluster.down() else f"there was no cluster {cluster.name!r} of ours"
            )
        case "status":
            return _status(cluster)
        case "kubeconfig":
            print(cluster.kubeconfig)
        case "load":
            cluster.load_images(arguments.images)
        case "logs":
            print(cluster.logs(arguments.component))
        case client:
            program = cluster.program(client)
            os.execvp(program, [program, "--kubeconfig", str(cluster.kubeconfig), *rest])  # noqa: S606
    return 0


def main(arguments: Sequence[str]) -> int:
    """Runs one command and gives its exit code."""
    own, rest = _split(arguments)
    parsed = _parser().parse_args(own)
    try:
        return _run(parsed, rest)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader had enough (`| head`); nothing more may be written, not even at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
