"""`python -m tests.e2e.demo up`: from a fresh clone to a conversation with a warm agent, on a Kubernetes of its own.

`up` makes the cluster, the images, LiveKit, our chart and two pools, calls both, and leaves everything running; `call` makes one more call; `down`
removes everything. Each can be repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.images import build_all
from tests.cluster.progress import Progress, words
from tests.cluster.providers import look
from tests.cluster.tool import DEFAULT_NAME, Cluster, open_cluster
from tests.e2e.conversation import OPENING_HOURS_WORDS, Conversation, Moment, call, words_of
from tests.e2e.deployment import (
    KEYLESS_IMAGE,
    LIVEKIT_IMAGE,
    MANIFESTS,
    NAMESPACE,
    OPERATOR_IMAGE,
    ROOT,
    Deployment,
    find,
    install,
    load,
)

POOL = "keyless"
COLD_POOL = "keyless-cold"
RECORDED = ROOT / "build" / "demo"
COLD_START_SECONDS = 150.0


@dataclass(frozen=True, slots=True)
class Report:
    """One call, ready to be printed."""

    title: str
    pod: str
    timeline: list[Moment]
    said: list[tuple[str, str]]
    wav: Path


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("up", "everything, and two calls"), ("call", "one more call"), ("down", "remove everything")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--name", default=DEFAULT_NAME, help="the cluster's name (default: %(default)s)")
        if name == "call":
            command.add_argument("--pool", default=POOL, help="which pool (default: %(default)s)")
            command.add_argument("--questions", type=int, default=1, help="how often to ask (default: %(default)s)")
    options = parser.parse_args(arguments)
    progress = Progress()
    try:
        cluster = open_cluster(
            options.name,
            machine=look(os.environ),
            progress=progress,
            say=(lambda reason: progress.say(f"cluster by {reason}")) if options.command == "up" else lambda _: None,
        )
        match options.command:
            case "up":
                _up(cluster, progress)
            case "call":
                _call_again(cluster, progress, options.pool, options.questions)
            case _:
                _down(cluster, progress)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error}\nWhat to do: free what is missing, then run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. `make demo` goes on from here, `make demo-down` removes what there is.", file=sys.stderr)
        return 130
    return 0


def _up(cluster: Cluster, progress: Progress) -> None:
    _side_by_side(cluster.up, lambda: build_all(progress, ("base", "operator", "keyless", "livekit")))
    changed = load(cluster, progress, (LIVEKIT_IMAGE, OPERATOR_IMAGE))
    deployments: list[Deployment] = []
    _side_by_side(
        lambda: deployments.append(install(cluster, progress, changed)),
        lambda: _load_keyless(cluster, progress),
    )
    deployment = deployments[0]
    for file in ("pool-keyless.yaml", "pool-keyless-cold.yaml"):
        deployment.apply_pool((MANIFESTS / file).read_text())
    with progress.step(f"waiting for the pool {POOL}: its agents import, load their models and park", 9):
        deployment.wait_until_ready(POOL)
    RECORDED.mkdir(parents=True, exist_ok=True)
    with progress.step("calling a warm agent", 15):
        warm = asyncio.run(_make_call(deployment, POOL, "warm agent", 1))
    with progress.step("the same with a cold start, to compare", 21):
        cold = asyncio.run(_make_call(deployment, COLD_POOL, "cold start", 1))
    print_calls(warm, cold)
    _print_next(cluster)
    progress.say(f"all done in {words(progress.elapsed_seconds)}")


def _load_keyless(cluster: Cluster, progress: Progress) -> None:
    if load(cluster, progress, (KEYLESS_IMAGE,)) and cluster.kubectl("get", "pods", "--output", "name").strip():
        # Warm agents of an older image of the same name; new ones take their place.
        cluster.kubectl("delete", "pods", "--selector", "voicepool.dev/state=warm", "--wait=false")


def _side_by_side(*steps: Callable[[], object]) -> None:
    """Run steps that do not compete at the same time; all end before the first error is raised."""
    with ThreadPoolExecutor(len(steps)) as threads:
        running = [threads.submit(step) for step in steps]
    for one in running:
        one.result()


def _call_again(cluster: Cluster, progress: Progress, pool: str, questions: int) -> None:
    if not cluster.running():
        raise ClusterError(f"the cluster {cluster.name!r} does not run", "make demo")
    RECORDED.mkdir(parents=True, exist_ok=True)
    deployment = find(cluster)

    def tell(heard: str) -> None:
        progress.say(heard)

    print_calls(asyncio.run(_make_call(deployment, pool, f"pool {pool}", questions, tell)))


async def _make_call(
    deployment: Deployment, pool: str, title: str, questions: int, tell: Callable[[str], None] = lambda _: None
) -> Report:
    wav = RECORDED / f"{pool}.wav"
    async with call(deployment, pool, timeout_seconds=COLD_START_SECONDS) as conversation:
        heard = [(await conversation.listen()).pcm]
        pod = await asyncio.to_thread(deployment.pod_of_session, conversation.session.session_id)
        name = str(pod["metadata"]["name"])
        tell(f"the agent {name} has said hello")
        for number in range(1, questions + 1):
            heard.append((await conversation.ask()).pcm)
            tell(f"question {number} of {questions} asked and answered")
        conversation.caller.write_wav(wav)
    said = [("agent", await words_of(heard[0]))]
    for answer in heard[1:]:
        said += [("caller", OPENING_HOURS_WORDS), ("agent", await words_of(answer))]
    bound_at = str(pod["metadata"]["annotations"]["voicepool.dev/bound-at"])
    return Report(title, name, _timeline(conversation, bound_at), said, wav)


def _timeline(conversation: Conversation, bound_at: str) -> list[Moment]:
    bound = datetime.datetime.fromisoformat(bound_at).timestamp() - conversation.session.requested_at
    return [
        Moment("request sent", 0.0),
        *sorted([Moment("bound", bound), *conversation.timeline()], key=lambda one: one.seconds),
    ]


def print_calls(*reports: Report) -> None:
    """Prints the calls beside each other."""
    print()
    print(" " * 36 + "".join(f"{report.title:>16}" for report in reports))
    for moment in reports[0].timeline:
        times = [{one.what: one.seconds for one in report.timeline}.get(moment.what) for report in reports]
        print(f"  {moment.what:<34}" + "".join(f"{'-' if one is None else f'{one:.3f} s':>16}" for one in times))
    for report in reports:
        print(f"\nWhat was said ({report.title}, pod {report.pod}):")
        for who, heard in report.said:
            print(f'  {who:<8}"{heard}"')
        print(f"  recorded in {report.wav.relative_to(ROOT)}")


def _print_next(cluster: Cluster) -> None:
    programs = Path(cluster.program("kubectl")).parent
    path = "" if programs == Path() else f" PATH={programs}:$PATH"
    demo = f".venv/bin/python -m tests.e2e.demo call{'' if cluster.name == DEFAULT_NAME else f' --name {cluster.name}'}"
    key = f"$(kubectl get secret voicepool-first-api-key --namespace {NAMESPACE} --output go-template="
    key += "'{{range .data}}{{. | base64decode}}{{end}}')"
    print(f"""
The cluster stays up. What to try next:

  export KUBECONFIG={cluster.kubeconfig}{path}
  kubectl get vpool --watch                        # the pool at work; Ctrl-C ends it
  kubectl scale vpool {POOL} --replicas=1
  kubectl get pods --show-labels --watch           # labels are the state

  {demo}                                           # start again
  {demo} --questions 5 &                           # a longer call ...
  kubectl delete vpool {POOL}                      # ... which goes on to its end without its pool
  kubectl apply --filename {(MANIFESTS / "pool-keyless.yaml").relative_to(ROOT)}

  curl --request POST http://{cluster.node_address}:30080/v1/public/{POOL}/start --header "Authorization: Bearer {key}"

  make demo-down                                   # removes everything
""")


def _down(cluster: Cluster, progress: Progress) -> None:
    with progress.step("removing the cluster", 6):
        existed = cluster.down()
    shutil.rmtree(RECORDED, ignore_errors=True)
    progress.say(f"{cluster.name!r} is gone" if existed else f"there was no cluster {cluster.name!r} of ours")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # LiveKit's native library has threads that call Python; they abort a process that is being taken down in order.
    os._exit(code)
