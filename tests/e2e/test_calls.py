"""Real calls on a real cluster: what a caller hears while pods, pools, operator and gateways come and go."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import aiohttp
import pytest
import yaml
from tests.cluster.errors import ClusterError
from tests.cluster.tool import Cluster
from tests.e2e.agent_process import Gateway, orders_to_refuse, post_order
from tests.e2e.caller import read_wav
from tests.e2e.conversation import Conversation, call, hear_out, offers_help, says_opening_hours, words_of
from tests.e2e.deployment import (
    AGENT_IMAGE,
    MANIFESTS,
    NAMESPACE,
    Deployment,
    Json,
    livekit_secret,
    secret_values,
)
from tests.e2e.pools import (
    KEYLESS,
    REFERENCE,
    Kubectl,
    MakePool,
    away,
    is_ready,
    kill,
    light,
    pool_of,
    processes_of,
    until,
)

from voicepool.binding import active_deadline_seconds, bind_patch, is_candidate
from voicepool.kube.convert import pod_from_json
from voicepool.model import AGENT_PORT, Disruption

pytestmark = pytest.mark.cluster


async def assert_told_the_opening_hours(conversation: Conversation) -> None:
    """Asks, and listens until the whole answer was heard."""
    await hear_out(await conversation.ask(), conversation.listen, says_opening_hours)


# A call


async def test_a_caller_asks_a_warm_agent_and_hears_the_answer(
    deployment: Deployment, make_pool: MakePool, tmp_path: Path
) -> None:
    manifest = yaml.safe_load((MANIFESTS / "pool-keyless.yaml").read_text())
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    pool = await make_pool("talk", container)
    async with call(deployment, pool) as conversation:
        await hear_out(await conversation.listen(), conversation.listen, offers_help)
        await assert_told_the_opening_hours(conversation)
        conversation.caller.write_wav(tmp_path / "call.wav")
    recorded, _ = read_wav(tmp_path / "call.wav")
    assert not conversation.session.cold_start
    words = await words_of(recorded)
    assert offers_help(words)
    assert says_opening_hours(words)


async def test_a_cold_start_waits_for_its_own_agent(deployment: Deployment, make_pool: MakePool) -> None:
    pool = await make_pool("cold", light(), replicas=0, onEmpty={"policy": "ColdStart"})
    async with call(deployment, pool, timeout_seconds=120) as conversation:
        tone = await conversation.listen()
    assert conversation.session.cold_start
    assert tone.seconds > 0.5


async def test_callers_reach_the_own_routes_of_the_bot_of_their_session_and_nothing_else_of_its_pod(
    deployment: Deployment, make_pool: MakePool
) -> None:
    pool = await make_pool("routed", light(LIGHT_BOT_ROUTES="yes"), replicas=2)
    one, other = [(await deployment.start(pool)).session_id for _ in range(2)]
    for session in (one, other):
        for before in (f"/v1/public/{pool}", ""):
            answer = await deployment.ask(f"{before}/sessions/{session}/session")
            assert answer == (200, {"session": session})
    assert (await deployment.ask(f"/sessions/{one}/session", api_key="wrong"))[0] == 401
    assert (await deployment.ask("/sessions/nobody/session"))[0] == 404
    assert (await deployment.ask(f"/sessions/{one}/no-such-route"))[1] == {"detail": "Not Found"}
    for path in ("../../status", "%2e%2e/%2e%2e/status", f"../{other}/session", "..%2f..%2fstatus", "a%5c..%5cstatus"):
        status, answered = await deployment.ask(f"/sessions/{one}/{path}")
        assert (status, answered["code"]) == (400, "INVALID_REQUEST")
    for path in ("readyz", "livez", "status", "metrics", "bind"):
        assert (await deployment.ask(f"/sessions/{one}/{path}"))[0] == 404


async def test_a_pod_refuses_what_its_gateway_has_not_ordered_and_is_as_warm_as_before(
    deployment: Deployment, make_pool: MakePool, cluster: Cluster
) -> None:
    pool = await make_pool("refusing", light(), onEmpty={"policy": "Reject"})
    (pod,) = await asyncio.to_thread(deployment.pods_of, pool)
    keys = await asyncio.to_thread(secret_values, cluster, "voicepool-assignment", NAMESPACE)
    gateway = Gateway(keys["private.pem"])
    claims = {"session": "s-1", "room": "r-1", "url": "ws://127.0.0.1:9", "token": "t"}
    async with aiohttp.ClientSession() as http:
        for order, status, code in orders_to_refuse(gateway, pod["metadata"]["uid"], **claims):
            answer = await post_order(http, f"http://{pod['status']['podIP']}:{AGENT_PORT}/bind", order)
            assert (answer[0], answer[1]["code"]) == (status, code)
    async with call(deployment, pool) as conversation:
        taken = await asyncio.to_thread(deployment.pod_of_session, conversation.session.session_id)
        assert taken["metadata"]["uid"] == pod["metadata"]["uid"]
        await conversation.listen()


# Only a Ready pod


async def test_a_pod_that_says_it_is_not_ready_is_given_to_no_caller(
    deployment: Deployment, make_pool: MakePool, kubectl: Kubectl
) -> None:
    pool = await make_pool("half-broken", light(), replicas=2, maxPods=2, onEmpty={"policy": "Reject"})
    broken, good = (pod["metadata"]["name"] for pod in await asyncio.to_thread(deployment.pods_of, pool))
    await kubectl("exec", broken, "--", "touch", "/tmp/broken")
    await kubectl("wait", "--for=condition=Ready=false", f"pod/{broken}", "--timeout=30s")
    first = await deployment.start(pool)
    second = await deployment.start(pool)
    pod = await asyncio.to_thread(deployment.pod_of_session, first.session_id)
    assert (first.status, pod["metadata"]["name"]) == (200, good)
    assert (second.status, second.code) == (429, "NO_WARM_AGENT")


@pytest.mark.parametrize(("policy", "status"), [("Reject", 429), ("Queue", 503)])
async def test_with_every_pod_broken_a_caller_is_told_so_in_time(
    deployment: Deployment, make_pool: MakePool, kubectl: Kubectl, policy: str, status: int
) -> None:
    pool = await make_pool(
        f"broken-{policy.lower()}",
        light(LIGHT_BOT_READY="no"),
        wait=False,
        replicas=2,
        maxPods=2,
        onEmpty={"policy": policy, "timeoutSeconds": 2},
    )
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/status').read().decode())"

    def all_parked() -> bool:
        pods = deployment.pods_of(pool)
        with suppress(ClusterError):
            states = [
                deployment.cluster.kubectl("exec", pod["metadata"]["name"], "--", "python3", "-c", ask) for pod in pods
            ]
            return len(states) == 2 and all(json.loads(state)["state"] == "parked" for state in states)
        return False

    await until("both agents to park", all_parked)
    answer = await deployment.start(pool, timeout_seconds=10)
    assert (answer.status, answer.code) == (status, "NO_WARM_AGENT")
    assert f"of the pods of default/{pool} 0 are in sessions or about to be, 2 are starting" in answer.words
    assert answer.retry_after_seconds is not None
    assert not [pod for pod in await asyncio.to_thread(deployment.pods_of, pool) if is_ready(pod)]


# Pods and pools that go


async def test_a_warm_pod_that_is_deleted_is_replaced(
    deployment: Deployment, make_pool: MakePool, kubectl: Kubectl
) -> None:
    pool = await make_pool("replaced", light())
    (before,) = await asyncio.to_thread(deployment.pods_of, pool)
    await kubectl("delete", "pod", before["metadata"]["name"])

    def successor() -> Json | None:
        pods = [pod for pod in deployment.pods_of(pool) if pod["metadata"]["uid"] != before["metadata"]["uid"]]
        return next((pod for pod in pods if is_ready(pod)), None)

    await until("another pod to be Ready", successor)


async def test_pods_that_are_deleted_in_the_moment_in_which_they_start_do_not_stay_for_their_long_grace(
    deployment: Deployment, make_pool: MakePool, kubectl: Kubectl
) -> None:
    pool = await make_pool("short-lived", light(), replicas=6, wait=False)
    told: set[str] = set()

    def new() -> set[str]:
        return {pod["metadata"]["uid"] for pod in deployment.pods_of(pool)} - told

    # Nobody sees the moment itself: of so many some hit it.
    for _ in range(4):
        told |= await until("pods on their way", new, every_seconds=0.05)
        await kubectl("delete", "pod", "--selector", f"voicepool.dev/pool={pool}", "--wait=false")
    await until("those pods to go", lambda: told <= told - {pod["metadata"]["uid"] for pod in deployment.pods_of(pool)})


async def test_a_call_goes_on_to_its_end_when_its_pool_is_scaled_to_zero_and_deleted(
    deployment: Deployment, make_pool: MakePool, kubectl: Kubectl
) -> None:
    pool = await make_pool("deleted", KEYLESS)
    async with call(deployment, pool) as conversation:
        session = conversation.session.session_id
        await conversation.listen()
        await kubectl("scale", "vpool", pool, "--replicas=0")
        await until("the warm pods to go", lambda: len(deployment.pods_of(pool)) == 1)
        await assert_told_the_opening_hours(conversation)
        await kubectl("delete", "vpool", pool)
        await assert_told_the_opening_hours(conversation)
        pod = await asyncio.to_thread(deployment.pod_of_session, session)
        assert pod["status"]["phase"] == "Running"
        assert "deletionTimestamp" not in pod["metadata"]
    await until(
        "the agent to end by itself",
        lambda: [pod for pod in deployment.pods_of(pool) if pod["status"]["phase"] == "Succeeded"],
    )


async def test_a_change_of_warmth_rolls_the_warm_pods_out_and_callers_hear_an_agent_of_each(
    deployment: Deployment, make_pool: MakePool, kubectl: Kubectl
) -> None:
    def warm_with(warmth: str) -> Json | None:
        variable = {"name": "VOICEPOOL_WARMTH", "value": warmth}
        pods = [pod for pod in deployment.pods_of(pool) if pod["metadata"]["labels"]["voicepool.dev/state"] == "warm"]
        return next((pod for pod in pods if is_ready(pod) and variable in pod["spec"]["containers"][0]["env"]), None)

    pool = await make_pool("warmth", light(), warmth="Imported")
    for warmth in ("Imported", "Started"):
        await kubectl("patch", "vpool", pool, "--type=merge", f"--patch={json.dumps({'spec': {'warmth': warmth}})}")
        await until(f"a warm pod that is {warmth}", partial(warm_with, warmth))
        async with call(deployment, pool) as conversation:
            assert (await conversation.listen()).seconds > 0.5
            pod = await asyncio.to_thread(deployment.pod_of_session, conversation.session.session_id)
            assert {"name": "VOICEPOOL_WARMTH", "value": warmth} in pod["spec"]["containers"][0]["env"]


# Processes of ours that are killed


async def test_a_call_goes_on_and_another_starts_while_the_operator_is_dead(
    deployment: Deployment, make_pool: MakePool
) -> None:
    pool = await make_pool("no-operator", KEYLESS, replicas=2)
    async with call(deployment, pool) as conversation:
        await conversation.listen()
        async with away(deployment, "app.kubernetes.io/component=operator", NAMESPACE, b"voicepool"):
            async with call(deployment, pool) as second:
                await assert_told_the_opening_hours(second)
            await assert_told_the_opening_hours(conversation)
            assert not await asyncio.to_thread(processes_of, deployment, "operator")


async def test_after_the_operator_was_killed_the_pool_is_filled_again(
    deployment: Deployment, make_pool: MakePool
) -> None:
    pool = await make_pool("killed-operator", light())
    processes = await asyncio.to_thread(processes_of, deployment, "operator")
    assert processes
    kill(processes)
    session = await deployment.start(pool)
    assert session.status == 200

    def successor() -> Json | None:
        warm = [pod for pod in deployment.pods_of(pool) if pod["metadata"]["labels"]["voicepool.dev/state"] == "warm"]
        return next((pod for pod in warm if is_ready(pod)), None)

    await until("a warm pod in place of the bound one", successor)
    assert not processes & await asyncio.to_thread(processes_of, deployment, "operator")


async def test_a_call_goes_on_when_every_gateway_is_killed(deployment: Deployment, make_pool: MakePool) -> None:
    pool = await make_pool("no-gateway", KEYLESS)
    async with call(deployment, pool) as conversation:
        await conversation.listen()
        # Those that start again would take from the agent and its caller what they need to hear each other.
        async with away(deployment, "app.kubernetes.io/component=gateway", NAMESPACE, b"voicepool"):
            await assert_told_the_opening_hours(conversation)
            assert not await asyncio.to_thread(processes_of, deployment, "gateway")


async def test_after_every_gateway_was_killed_sessions_start_again(deployment: Deployment, make_pool: MakePool) -> None:
    pool = await make_pool("killed-gateways", light())
    processes = await asyncio.to_thread(processes_of, deployment, "gateway")
    assert processes
    kill(processes)

    def new_gateways() -> bool:
        pods = deployment.pods("app.kubernetes.io/component=gateway", NAMESPACE)
        restarted = all(pod["status"]["containerStatuses"][0]["restartCount"] > 0 for pod in pods)
        return restarted and all(is_ready(pod) for pod in pods)

    await until("the gateways to be Ready again", new_gateways)
    assert not processes & await asyncio.to_thread(processes_of, deployment, "gateway")
    assert (await deployment.start(pool)).status == 200


def bind_as_a_gateway_that_dies(deployment: Deployment, pool: str) -> str:
    """Binds a pod of the pool and delivers nothing; its name."""
    found = next(pod for pod in map(pod_from_json, deployment.pods_of(pool)) if pod is not None and is_candidate(pod))
    now = datetime.now(UTC)
    operations = bind_patch(
        found,
        session_id="undelivered",
        room="undelivered",
        bound_at=now,
        bound_by="a gateway that died",
        active_deadline_seconds=active_deadline_seconds(found, 600, now),
        disruption=Disruption.NEVER,
        drain_seconds=0,
    )
    deployment.cluster.kubectl("patch", "pod", found.name, "--type=json", "--patch", json.dumps(operations))
    return found.name


async def test_a_bind_that_nobody_delivered_is_undone_and_a_call_is_not_also_while_the_kubelet_stands_still(
    deployment: Deployment, make_pool: MakePool
) -> None:
    try:
        kubelet = deployment.cluster.component_pid("kubelet")
    except ClusterError as error:
        pytest.skip(f"the kubelet cannot be stopped here: {error}")
    pool = await make_pool("undelivered", light(), replicas=2)
    left = await asyncio.to_thread(bind_as_a_gateway_that_dies, deployment, pool)

    def deleted() -> list[Json]:
        return [pod for pod in deployment.pods_of(pool) if "deletionTimestamp" in pod["metadata"]]

    async with call(deployment, pool) as conversation:
        await conversation.listen()
        # From now on both pods are Ready and bound for all that the API server knows, and only their agents know more.
        os.kill(kubelet, signal.SIGSTOP)
        try:
            gone = await until("the pod without a session to be deleted", deleted, deadline_seconds=120)
            # By then the other one has been asked as well: it was bound a moment later.
            await asyncio.sleep(10)
            pods = await asyncio.to_thread(deleted)
        finally:
            os.kill(kubelet, signal.SIGCONT)
        assert {pod["metadata"]["name"] for pod in (*gone, *pods)} == {left}
        pod = await asyncio.to_thread(deployment.pod_of_session, conversation.session.session_id)
        assert pod["status"]["phase"] == "Running"
    await until(
        "the Event that tells of it, once the pod has gone",
        lambda: deployment.cluster.kubectl(
            "get", "events", "--field-selector", "reason=SessionUndelivered", "--output", "name"
        ).strip(),
    )


# Many at once


async def test_twenty_callers_at_once_on_ten_agents_get_ten_agents_and_ten_clear_answers(
    deployment: Deployment, make_pool: MakePool
) -> None:
    pool = await make_pool("ten", light(), replicas=10, maxPods=10, onEmpty={"policy": "Reject"})
    answers = await asyncio.gather(*(deployment.start(pool) for _ in range(20)))
    started = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    pods = await asyncio.to_thread(deployment.pods_of, pool)
    bound = {
        pod["metadata"]["labels"]["voicepool.dev/session"]: pod["metadata"]["name"]
        for pod in pods
        if pod["metadata"]["labels"]["voicepool.dev/state"] == "bound"
    }
    assert len(started) == 10
    assert bound.keys() == {answer.session_id for answer in started}
    assert len(set(bound.values())) == 10
    assert {answer.status for answer in refused} == {429}
    assert {answer.code for answer in refused} <= {"NO_WARM_AGENT", "POOL_AT_CAPACITY"}
    assert all(answer.retry_after_seconds and pool in answer.words for answer in refused)


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"replica": 3}, 'unknown field "spec.replica"'),
        ({"replicas": -1}, "spec.replicas in body should be greater than or equal to 0"),
        ({"onEmpty": {"policy": "Wait"}}, 'supported values: "Queue", "ColdStart", "Reject"'),
        (
            {"template": {"spec": {"containers": [{"name": "main", "image": AGENT_IMAGE}]}}},
            "spec.template.spec.containers must have a container named 'agent'",
        ),
    ],
)
def test_the_api_server_refuses_a_mistake_in_words(deployment: Deployment, mistake: Json, words: str) -> None:
    pool = pool_of("mistaken", REFERENCE)
    pool["spec"].update(mistake)
    with pytest.raises(ClusterError) as refusal:
        deployment.apply_pool(pool)
    assert words in refusal.value.detail


NOT_THERE: Json = {"secretRef": {"name": "no-such-secret"}}
NOWHERE: Json = {"name": "no-such-volume", "mountPath": "/data"}


@pytest.mark.parametrize(
    ("pool", "container", "reason", "words"),
    [
        ("no-image", {"image": "localhost/no-such-image:1"}, "ImagePullFailed", "'localhost/no-such-image:1': "),
        (
            "no-secret",
            {**light(), "envFrom": [NOT_THERE]},
            "ContainerConfigFailed",
            'secret "no-such-secret" not found',
        ),
        (
            "too-large",
            {**light(), "resources": {"requests": {"memory": "900Gi"}}},
            "Unschedulable",
            "0/1 nodes are available: 1 Insufficient memory",
        ),
        (
            "refused",
            {**REFERENCE, "volumeMounts": [NOWHERE]},
            "TemplateInvalid",
            'spec.containers[0].volumeMounts[0].name: Not found: "no-such-volume"',
        ),
    ],
)
async def test_kubectl_tells_of_a_pool_that_cannot_start_its_agents_why_not(
    deployment: Deployment, make_pool: MakePool, kubectl: Kubectl, pool: str, container: Json, reason: str, words: str
) -> None:
    await make_pool(pool, container, wait=False)
    path = '{.status.conditions[?(@.type=="Ready")].reason}'
    await kubectl("wait", f"vpool/{pool}", f"--for=jsonpath={path}={reason}", "--timeout=60s")
    table = (await kubectl("get", "vpool", pool, "--output", "wide")).splitlines()
    assert reason in table[1].split()
    assert words in table[1]
    described = " ".join((await kubectl("describe", "vpool", pool)).split())
    assert f"Reason: {reason}" in described
    assert words in described.partition("Events: ")[0]


async def test_a_missing_key_of_the_reference_bot_is_named_in_a_condition(
    deployment: Deployment, make_pool: MakePool
) -> None:
    container = {
        **REFERENCE,
        "env": [{"name": "ASSEMBLYAI_API_KEY", "value": "x"}, {"name": "GROQ_API_KEY", "value": "x"}],
    }
    pool = await make_pool("no-key", container, wait=False)

    def failed() -> Json | None:
        condition = deployment.conditions(pool).get("Ready")
        return condition if condition and condition["reason"] == "AgentFailed" else None

    condition = await until("the condition Ready to say AgentFailed", failed)
    assert condition["status"] == "False"
    assert "set INWORLD_API_KEY in the Secret" in condition["message"]


# Secrets

TOKEN = re.compile(r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}")


def written(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Everything that the cluster shows to those who may not read Secrets: where, and the text."""
    objects = json.loads(
        cluster.kubectl(
            "get", "pods,vpool,deployments,services,configmaps,secrets", "--all-namespaces", "--output", "json"
        )
    )["items"]
    for one in objects:
        metadata = one["metadata"]
        shown = {"labels": metadata.get("labels"), "annotations": metadata.get("annotations")}
        if one["kind"] != "Secret":
            shown["status"] = one.get("status")
        yield f"{one['kind']} {metadata['name']}", json.dumps(shown)
    yield "events", cluster.kubectl("get", "events", "--all-namespaces", "--output", "json")
    for pod in (one for one in objects if one["kind"] == "Pod"):
        name, where = pod["metadata"]["name"], ("--namespace", pod["metadata"]["namespace"])
        yield f"log of {name}", cluster.kubectl("logs", name, "--all-containers", *where)
        for status in pod["status"].get("containerStatuses") or ():
            if status["restartCount"]:
                yield f"earlier log of {name}", cluster.kubectl("logs", name, "--previous", *where)
    for component in cluster.components():
        yield f"log of {component}", cluster.logs(component, lines=1_000_000)


async def test_no_secret_is_in_any_log_label_annotation_event_or_status(
    deployment: Deployment, make_pool: MakePool
) -> None:
    cluster = deployment.cluster
    pool = await make_pool("secrets", light())
    async with call(deployment, pool) as conversation:
        await conversation.listen()
    await until(
        "the agent to end",
        lambda: [pod for pod in deployment.pods_of(pool) if pod["status"]["phase"] == "Succeeded"],
    )
    secrets = {
        "the API key": deployment.api_key,
        "the LiveKit secret": livekit_secret(cluster),
        "the caller's token": conversation.session.token,
        "the private key": secret_values(cluster, "voicepool-assignment", NAMESPACE)["private.pem"].splitlines()[1],
    }
    assert all(len(secret) > 20 for secret in secrets.values())

    # As it is, and as a Secret's manifest would have it.
    forms = [(what, text) for what, one in secrets.items() for text in (one, base64.b64encode(one.encode()).decode())]
    found = []
    logs = 0
    for place, text in await asyncio.to_thread(list, written(cluster)):
        logs += "log of" in place and bool(text.strip())
        found += [f"{what} in {place}" for what, secret in forms if secret in text]
        found += [f"a token in {place}" for _ in TOKEN.findall(text)[:1]]
    assert not found
    assert logs >= 4, "operator, gateway, LiveKit and agent have written something"
