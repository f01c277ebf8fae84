"""Faults that a gateway meets, each caused for real: what its callers hear, and what is left behind.

etcd, API server, operator and two gateways are real processes; kubelet, agents and LiveKit are played on loopback addresses. The first gateway goes to
the API server through a door, so that a fault can come between a bind and its answer. What was right is judged from outside: by the API server's
audit log, by what the agents saw, and by what the callers were told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.cluster.chaos.agents import SESSION_SECONDS, Agent
from tests.cluster.chaos.callers import NO_ANSWER, OK, Answer, ask
from tests.cluster.chaos.door import Door, Passing, throttled
from tests.cluster.chaos.judge import Fault, Verdict
from tests.cluster.chaos.stage import PARALLEL_WRITES, Company, accounts, company, pool_manifest, until
from tests.cluster.tool import Cluster
from tests.conftest import Show
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.peers import unmet_path
from voicepool.kube.api import PODS, POOLS
from voicepool.kube.convert import pod_from_json
from voicepool.model import BindState, PodFact
from voicepool.reaper import ASK_AFTER_SECONDS

pytestmark = [pytest.mark.control_plane, pytest.mark.asyncio(loop_scope="module")]

OPTIONS = GatewayOptions()
FILL_SECONDS = 40.0
SOON_SECONDS = 6.0
"""In which the gateway has undone what it can undo at once, on a busy machine."""
SLACK_SECONDS = 12.0
"""What a busy machine may take on top of a limit to bring a thousand answers."""
ADMINISTRATOR = "administrator"
LONG_CALLS = (600.0, 600.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def everybody(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Company]:
    folder = tmp_path_factory.mktemp("faults")
    with accounts(control_plane, folder) as acts:
        async with company(control_plane, acts, folder, operators=1, with_door=True) as made:
            yield made


@pytest_asyncio.fixture(loop_scope="module")
async def here(everybody: Company) -> AsyncIterator[Company]:
    yield everybody
    door_of(everybody).open()
    everybody.agents.on_order = lambda _agent: None
    everybody.agents.session_seconds = SESSION_SECONDS
    await everybody.livekit.come_back()
    for gateway in everybody.gateways:
        gateway.go_on()
        await gateway.ready()
    assert everybody.agents.errors == []


def door_of(here: Company) -> Door:
    assert here.door is not None
    return here.door


@dataclass
class Pool:
    """One pool, its agents and its callers."""

    here: Company
    name: str
    max_pods: int
    calls: list[Answer] = field(default_factory=list)
    """All that anybody was told."""

    async def ask(self, gateway: int, key: str | None = None, patience_seconds: float = 90.0) -> Answer:
        """One caller at one gateway; with a key he may come back."""
        body = {"pool": f"{self.here.accounts.namespace}.{self.name}", "transport": "livekit"}
        headers = {"Authorization": f"Bearer {self.here.api_key}"} | ({"Idempotency-Key": key} if key else {})
        answer = await ask(
            self.here.http, self.here.gateways[gateway].address, body, headers, patience_seconds=patience_seconds
        )
        self.calls.append(answer)
        return answer

    async def ask_again_and_again(self, gateway: int, key: str, patience_seconds: float = 90.0) -> list[Answer]:
        """One caller who goes to the other gateway with his key when one does not answer, and comes back when he is told to; all that he heard."""
        loop = asyncio.get_running_loop()
        until_then = loop.time() + 100.0
        heard: list[Answer] = []
        while loop.time() < until_then:
            heard.append(await self.ask(gateway, key, patience_seconds))
            if heard[-1].code == OK:
                break
            gateway = 1 - gateway
            await asyncio.sleep(float(heard[-1].retry_after or 0.2))
        return heard

    async def scale(self, replicas: int) -> None:
        """How many are to be warm."""
        await self.here.api.merge_patch(
            POOLS, self.here.accounts.namespace, self.name, {"spec": {"replicas": replicas}}
        )

    async def known(self) -> bool:
        """Whether all gateways know the pool."""
        return None not in await self._told()

    async def waiting(self) -> int:
        """Callers in its queues, by the gateways' own count."""
        return sum(json.loads(told)["waiting"] for told in await self._told() if told is not None)

    async def _told(self) -> list[str | None]:
        path = unmet_path((self.here.accounts.namespace, self.name))
        return [await gateway.ask(path) for gateway in self.here.gateways]

    def agents(self) -> list[Agent]:
        """All that there ever were."""
        return [agent for agent in self.here.agents.by_uid.values() if agent.pod.startswith(f"{self.name}-")]

    def with_session(self, session: str) -> list[Agent]:
        """The agents that are in the room of a session, or were."""
        return [agent for agent in self.agents() if agent.session == session and agent.joined is not False]

    def pods(self) -> list[PodFact]:
        """All that are there."""
        return [pod for pod in self.here.agents.pods if pod.pool == self.name]

    def warm(self) -> int:
        """How many pods a caller could get."""
        return sum(pod.state is BindState.WARM and pod.ready and not pod.deleting for pod in self.pods())

    def undelivered(self) -> list[str]:
        """Pods that are bound and whose agents have no session."""
        bound = [pod for pod in self.pods() if pod.state is BindState.BOUND]
        return [pod.name for pod in bound if not self.here.agents.by_uid[pod.uid].session]

    async def filled(self, count: int, seconds: float = FILL_SECONDS) -> None:
        """Wait until so many are warm."""

        async def warm() -> bool:
            return self.warm() >= count

        await until(warm, seconds)

    async def nothing_undelivered(self, seconds: float) -> float:
        """Wait until no pod is bound without its session; how long that took."""

        async def none() -> bool:
            return not self.undelivered()

        return await until(none, seconds)

    def verdict(self) -> Verdict:
        """What the audit log says of this pool's pods."""
        return self.here.judge(self.name, self.max_pods, PARALLEL_WRITES)

    def faults(self) -> list[Fault]:
        """What may not happen and did, but for what a test itself did with the administrator's rights."""
        return [fault for fault in self.verdict().faults if not fault.words.startswith(f"{ADMINISTRATOR} deleted ")]


@contextlib.asynccontextmanager
async def pool_of(here: Company, name: str, replicas: int, *, max_pods: int = 40, **spec: Any) -> AsyncIterator[Pool]:
    """A pool that is full, and deleted in the end."""
    namespace = here.accounts.namespace
    manifest = pool_manifest(namespace, name, replicas=replicas, maxPods=max_pods, **spec)
    await here.api.create(POOLS, namespace, manifest)
    made = Pool(here, name, max_pods)
    try:
        await until(made.known, SOON_SECONDS)
        await made.filled(replicas)
        yield made
    finally:
        await asyncio.to_thread(here.cluster.kubectl, "delete", "vpool", name, "--namespace", namespace, "--wait=false")


def said(answers: Sequence[Answer]) -> Counter[tuple[int, str]]:
    """What was said how often."""
    return Counter((answer.status, answer.code) for answer in answers)


def slowest(answers: Sequence[Answer]) -> float:
    return max(answer.seconds for answer in answers)


@pytest.mark.parametrize("end", ["deleted", "cut-off"])
async def test_whoever_is_given_a_pod_that_dies_before_it_has_the_session_gets_the_next_one(
    here: Company, end: str
) -> None:
    async with pool_of(here, f"dies-{end}", 1) as demo:
        struck: list[PodFact] = []

        async def strike(passing: Passing) -> None:
            if struck or not passing.is_patch_of_a_pod or passing.status != 200:
                return
            pod = pod_from_json(json.loads(passing.answer))
            assert pod is not None
            struck.append(pod)
            agent = here.agents.by_uid[pod.uid]
            if end == "cut-off":
                return
            await here.api.delete(
                PODS,
                pod.namespace,
                pod.name,
                uid=pod.uid,
                resource_version=pod.resource_version,
                grace_period_seconds=0,
            )

            async def gone() -> bool:
                return here.agents.has_gone(agent)

            await until(gone, SOON_SECONDS)

        door_of(here).after = strike
        if end == "cut-off":
            # Before it is bound: the gateway connects while it binds.
            (pod,) = demo.pods()
            await here.agents.cut_off(here.agents.by_uid[pod.uid])
        answer = await demo.ask(0)
        (dead,) = struck
        assert answer.code == OK
        assert answer.seconds < OPTIONS.bind_timeout_seconds + SOON_SECONDS
        assert (answer.session, answer.room) == (dead.session, dead.room)
        (agent,) = demo.with_session(answer.session)
        assert agent.uid != dead.uid
        assert agent.pod == answer.pod
        await demo.nothing_undelivered(SOON_SECONDS)
        assert demo.faults() == []


async def test_of_an_agent_that_answers_late_and_the_next_one_only_one_is_ever_in_the_room(
    here: Company, show: Show
) -> None:
    late_seconds = OPTIONS.assignment_seconds + 3.5
    async with pool_of(here, "late", 6) as demo:
        here.agents.session_seconds = LONG_CALLS
        strange: dict[str, Agent] = {}

        def meet(agent: Agent) -> None:
            if len(strange) == 3 or agent in strange.values():
                return
            kind = ("answers late", "looks late", "looks late with a slow clock")[len(strange)]
            strange[kind] = agent
            if kind == "answers late":
                agent.answers_after_seconds = OPTIONS.bind_timeout_seconds + 2
            else:
                agent.freeze(late_seconds)
            if kind == "looks late with a slow clock":
                agent.clock_behind_seconds = 30.0

        here.agents.on_order = meet
        answers = await asyncio.gather(*(demo.ask(0) for _ in range(3)))
        by_session = {answer.session: answer for answer in answers}
        show(f"answered after {', '.join(f'{answer.seconds:.1f} s' for answer in answers)}")
        assert said(answers) == {(200, OK): 3}
        kept, refused, deluded = strange.values()
        sessions = {pod.uid: pod.session or "" for pod in demo.pods()}

        async def looked() -> bool:
            return refused.looked_at > 0 and deluded.joined is not None

        await until(looked, late_seconds + SLACK_SECONDS)
        assert by_session[kept.session].pod == kept.pod
        assert [agent.pod for agent in demo.with_session(kept.session)] == [kept.pod]

        assert (refused.session, refused.orders) == ("", 1)
        assert deluded.joined is False
        for late, session in ((refused, sessions[refused.uid]), (deluded, deluded.session)):
            assert by_session[session].pod != late.pod
            assert by_session[session].seconds > OPTIONS.assignment_seconds
        for answer in answers:
            assert [agent.pod for agent in demo.with_session(answer.session)] == [answer.pod]
            assert all(agent.joined for agent in demo.with_session(answer.session))
        assert demo.faults() == []


@pytest.mark.parametrize("how", ["away", "silent"])
async def test_with_livekit_down_callers_are_told_so_and_no_pod_stays_bound(
    here: Company, show: Show, how: str
) -> None:
    async with pool_of(here, f"livekit-{how}", 8) as demo:
        # A room that was made: from now on the bind does not wait for the next one.
        assert [(await demo.ask(number)).code for number in (0, 1)] == [OK, OK]
        await demo.filled(8)
        if how == "away":
            await here.livekit.go_away()
        else:
            here.livekit.fall_silent()
        answers = await asyncio.gather(*(demo.ask(number % 2) for number in range(8)))
        show(f"{dict(said(answers))}, the slowest after {slowest(answers):.1f} s")
        assert said(answers) == {(503, "LIVEKIT_UNAVAILABLE"): 8}
        assert all(answer.says_when_to_come_again for answer in answers)
        assert slowest(answers) < OPTIONS.livekit_timeout_seconds + SOON_SECONDS
        await demo.nothing_undelivered(SOON_SECONDS)
        binds = demo.verdict().binds
        again = await asyncio.gather(*(demo.ask(number % 2) for number in range(4)))
        assert said(again) == {(503, "LIVEKIT_UNAVAILABLE"): 4}
        assert demo.verdict().binds == binds
        await here.livekit.come_back()
        assert [(await demo.ask(number)).code for number in (0, 1)] == [OK, OK]
        assert demo.faults() == []


async def test_a_slow_api_server_makes_callers_wait_and_no_more(here: Company, show: Show) -> None:
    stopped_seconds = 5.0
    async with pool_of(here, "slow", 12) as demo:
        process = here.cluster.component_pid("kube-apiserver")
        os.kill(process, signal.SIGSTOP)
        try:
            calls = [
                asyncio.create_task(demo.ask(number % 2, f"slow-{number}" if number % 3 else None))
                for number in range(12)
            ]
            await asyncio.sleep(stopped_seconds)
            assert not any(call.done() for call in calls)
        finally:
            os.kill(process, signal.SIGCONT)
        answers = await asyncio.gather(*calls)
        show(f"{dict(said(answers))}, the slowest after {slowest(answers):.1f} s")
        assert said(answers) == {(200, OK): 12}
        assert slowest(answers) < stopped_seconds + SLACK_SECONDS
        await demo.nothing_undelivered(SOON_SECONDS)
        assert demo.faults() == []


async def test_callers_of_an_api_server_that_is_killed_and_comes_back_get_their_agents(
    here: Company, show: Show
) -> None:
    down_seconds = 2.0
    async with pool_of(here, "down", 12) as demo:
        await asyncio.to_thread(here.cluster.kill, "kube-apiserver")
        try:
            calls = [
                asyncio.create_task(demo.ask(number % 2, f"down-{number}" if number % 3 else None))
                for number in range(12)
            ]
            await asyncio.sleep(down_seconds)
        finally:
            await asyncio.to_thread(here.cluster.start, "kube-apiserver")
        answers = await asyncio.gather(*calls)
        show(f"{dict(said(answers))}, the slowest after {slowest(answers):.1f} s")
        await asyncio.to_thread(here.cluster.wait_for_api)
        # On a machine where it takes longer than they have time, they are told so, and not before.
        assert set(said(answers)) <= {(200, OK), (503, "CLUSTER_UNAVAILABLE")}
        assert all(answer.code == OK or answer.seconds >= OPTIONS.start_deadline_seconds for answer in answers)
        assert all(answer.code == OK or answer.says_when_to_come_again for answer in answers)
        assert slowest(answers) < OPTIONS.start_deadline_seconds + SLACK_SECONDS
        assert (await demo.ask(0)).code == (await demo.ask(1)).code == OK
        await demo.nothing_undelivered(SOON_SECONDS)
        assert demo.faults() == []


async def test_an_api_server_that_throttles_is_asked_again_when_it_said_and_not_before(
    here: Company, show: Show
) -> None:
    throttled_seconds, pause_seconds = 3.0, 1
    async with pool_of(here, "throttled", 6) as demo:
        loop = asyncio.get_running_loop()
        over: float | None = None
        refused = 0

        async def throttle(passing: Passing) -> web.Response | None:
            nonlocal over, refused
            if not passing.is_patch_of_a_pod:
                return None
            over = over or loop.time() + throttled_seconds
            if loop.time() > over:
                return None
            refused += 1
            return throttled(pause_seconds)

        door_of(here).before = throttle
        answers = await asyncio.gather(*(demo.ask(0) for _ in range(6)))
        show(f"{dict(said(answers))}, the slowest after {slowest(answers):.1f} s; {refused} patches refused")
        assert said(answers) == {(200, OK): 6}
        assert slowest(answers) < throttled_seconds + pause_seconds + SOON_SECONDS
        assert 1 <= refused <= 6 * (throttled_seconds / pause_seconds + 1)
        assert demo.faults() == []


async def test_a_thousand_callers_of_an_empty_pool_are_all_answered_in_time_and_cost_no_memory(
    here: Company, show: Show
) -> None:
    queue_seconds = 3

    async def thousand(demo: Pool) -> list[Answer]:
        return list(await asyncio.gather(*(demo.ask(number % 2) for number in range(1000))))

    async with pool_of(here, "rejects", 0, onEmpty={"policy": "Reject"}) as demo:
        rejected = await thousand(demo)
        show(f"Reject: {dict(said(rejected))}, the slowest after {slowest(rejected):.1f} s")
        assert said(rejected) == {(429, "NO_WARM_AGENT"): 1000}
        assert all(answer.says_when_to_come_again for answer in rejected)
        assert slowest(rejected) < SLACK_SECONDS
    queue = {"policy": "Queue", "timeoutSeconds": queue_seconds}
    async with pool_of(here, "queues", 0, onEmpty=queue) as demo:
        resident = []
        for _ in range(2):
            queued = await thousand(demo)
            resident.append(sum(gateway.memory_bytes() for gateway in here.gateways))
            show(f"Queue: {dict(said(queued))}, the slowest after {slowest(queued):.1f} s; {resident[-1] >> 20} MiB")
            assert said(queued) == {(503, "NO_WARM_AGENT"): 1000}
            assert all(answer.says_when_to_come_again for answer in queued)
            assert queue_seconds <= min(answer.seconds for answer in queued)
            assert slowest(queued) < queue_seconds + SLACK_SECONDS
        # What the first thousand needed, the second used again.
        assert resident[1] - resident[0] < 16 << 20
        assert await demo.waiting() == 0
        assert demo.verdict().binds == 0


async def test_a_queue_of_a_thousand_drains_and_who_hangs_up_leaves_his_place_and_no_pod(
    here: Company, show: Show
) -> None:
    queue_seconds = 15
    queue = {"policy": "Queue", "timeoutSeconds": queue_seconds}
    async with pool_of(here, "thousand", 0, max_pods=300, onEmpty=queue) as demo:
        calls = [asyncio.create_task(demo.ask(number % 2)) for number in range(1000)]

        def hang_up(callers: Sequence[asyncio.Task[Answer]]) -> None:
            for call in callers:
                call.cancel()

        async def wait(count: int) -> None:
            async def so_many() -> bool:
                return await demo.waiting() == count

            await until(so_many, queue_seconds)

        await wait(1000)
        hang_up(calls[:150])
        await wait(850)
        await demo.scale(150)

        async def some_served() -> bool:
            return len(demo.calls) >= 30

        await until(some_served, queue_seconds)
        # In the middle of their binds, some of them.
        hang_up(random.sample([call for call in calls if not call.done()], 50))
        answers = [one for one in await asyncio.gather(*calls, return_exceptions=True) if isinstance(one, Answer)]
        served = {answer.session for answer in answers if answer.code == OK}
        show(f"{dict(said(answers))}, the slowest after {slowest(answers):.1f} s")
        assert set(said(answers)) <= {(200, OK), (503, "NO_WARM_AGENT")}
        assert all(answer.code == OK or answer.says_when_to_come_again for answer in answers)
        assert len(answers) == 800
        assert len(served) > 150
        assert slowest(answers) < queue_seconds + SLACK_SECONDS
        await demo.nothing_undelivered(SOON_SECONDS)
        assert await demo.waiting() == 0
        # An agent that nobody knows of was told to end, unless the line was dead already when its caller was told.
        unknown = [agent for agent in demo.agents() if agent.session and agent.session not in served]
        show(f"{len(unknown)} agents for who had hung up, {sum(agent.told_to_end for agent in unknown)} told to end")
        assert len(unknown) <= 50
        await demo.filled(1)
        assert (await demo.ask(0)).code == OK
        show(demo.verdict().words())
        assert demo.faults() == []


async def test_a_call_whose_gateway_is_killed_after_the_webhook_gets_its_agent_from_the_other_one(
    here: Company,
) -> None:
    async with pool_of(here, "inbound", 2, inbound={"roomPrefix": "call-"}) as demo:
        here.livekit.callers_rooms["call-1"] = "RM_1"
        arrived = asyncio.Event()

        async def keep_back(passing: Passing) -> web.Response | None:
            if passing.is_patch_of_a_pod:
                arrived.set()
                # Until the gateway is no more.
                await asyncio.Event().wait()
            return None

        door_of(here).before = keep_back
        told = asyncio.create_task(tell(here, 0, "call-1"))
        await asyncio.wait_for(arrived.wait(), SOON_SECONDS)
        assert not told.done()
        await here.gateways[0].kill()
        # As LiveKit does with a webhook that was not answered.
        assert await told == NO_ANSWER
        assert await tell(here, 1, "call-1") == 200
        (agent,) = [agent for agent in demo.agents() if agent.session]

        async def bound_for_the_room() -> bool:
            return {pod.uid: pod.room for pod in demo.pods()}[agent.uid] == "call-1"

        # The agent has its order before the watch has shown the bind.
        await until(bound_for_the_room, SOON_SECONDS)
        assert demo.undelivered() == []
        assert demo.faults() == []


async def tell(here: Company, gateway: int, room: str) -> int:
    """LiveKit's webhook of a telephone that has joined; the status of the answer."""
    body, headers = here.livekit.webhook(room)
    try:
        address = f"{here.gateways[gateway].address}/livekit/webhook"
        async with here.http.post(address, data=body, headers=headers) as answer:
            return answer.status
    except aiohttp.ClientError:
        return NO_ANSWER


async def test_a_gateway_that_is_killed_in_a_burst_leaves_no_pod_bound_and_its_callers_find_their_agents_elsewhere(
    here: Company, show: Show
) -> None:
    async with pool_of(here, "killed", 300, max_pods=700) as demo:
        here.agents.session_seconds = LONG_CALLS
        binds = 0
        kept_back: list[PodFact] = []

        async def keep_back(passing: Passing) -> None:
            nonlocal binds
            if not passing.is_patch_of_a_pod or passing.status != 200:
                return
            binds += 1
            if binds > 50:
                pod = pod_from_json(json.loads(passing.answer))
                assert pod is not None
                kept_back.append(pod)
                # Until the gateway is no more.
                await asyncio.Event().wait()

        door_of(here).after = keep_back
        once = [asyncio.create_task(demo.ask(0)) for _ in range(30)]
        keyed = [asyncio.create_task(demo.ask_again_and_again(n % 2, f"killed-{n}")) for n in range(270)]

        async def enough() -> bool:
            return len(kept_back) >= 30

        await until(enough, FILL_SECONDS)
        await here.gateways[0].kill()
        door_of(here).open()
        heard = await asyncio.gather(*keyed)
        lost = [answer for answer in await asyncio.gather(*once) if answer.status == NO_ANSWER]
        stranded = {pod.uid for pod in kept_back}
        attempts = Counter(len(answers) for answers in heard)
        show(f"{len(stranded)} pods bound and not delivered; callers with a key asked so often: {dict(attempts)}")
        whole = [sum(answer.seconds for answer in answers) for answers in heard]
        show(f"the last of them had an agent after {max(whole):.1f} s; {len(lost)} callers without a key heard nothing")
        told = said([answer for answers in heard for answer in answers])
        show(f"all that they heard: {dict(told)}")
        assert all(answers[-1].code == OK for answers in heard)
        assert all(answer.seconds < 20 + OPTIONS.start_deadline_seconds for answer in demo.calls)
        assert all(answer.status in (NO_ANSWER, 200) or answer.says_when_to_come_again for answer in demo.calls)
        for answers in heard:
            assert [agent.pod for agent in demo.with_session(answers[-1].session)] == [answers[-1].pod]
        reaped_seconds = await demo.nothing_undelivered(ASK_AFTER_SECONDS + SLACK_SECONDS)
        show(f"nothing was bound without its session {reaped_seconds:.1f} s later")
        assert [agent.pod for agent in demo.agents() if agent.uid in stranded and agent.session] == []
        assert demo.faults() == []


async def test_a_gateway_that_stands_still_in_a_burst_and_goes_on_gives_nobody_a_second_agent(
    here: Company, show: Show
) -> None:
    async with pool_of(here, "frozen", 300, max_pods=700) as demo:
        here.agents.session_seconds = LONG_CALLS
        orders = 0
        met = asyncio.Event()

        def count(_agent: Agent) -> None:
            nonlocal orders
            orders += 1
            if orders == 80:
                here.gateways[0].freeze()
                met.set()

        here.agents.on_order = count
        calls = [
            asyncio.create_task(demo.ask_again_and_again(number % 2, f"frozen-{number}", patience_seconds=4))
            for number in range(300)
        ]
        await asyncio.wait_for(met.wait(), FILL_SECONDS)
        await asyncio.sleep(0.5)
        half_way = demo.undelivered()
        await asyncio.sleep(6)
        here.gateways[0].go_on()
        heard = await asyncio.gather(*calls)
        attempts = Counter(len(answers) for answers in heard)
        show(f"{len(half_way)} pods were bound and not delivered; callers asked so often: {dict(attempts)}")
        show(f"all that they heard: {dict(said([answer for answers in heard for answer in answers]))}")
        assert all(answers[-1].code == OK for answers in heard)
        assert attempts[1] < 300
        for answers in heard:
            assert [agent.pod for agent in demo.with_session(answers[-1].session)] == [answers[-1].pod]
        await demo.nothing_undelivered(ASK_AFTER_SECONDS + SLACK_SECONDS)
        assert demo.faults() == []
