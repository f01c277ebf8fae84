"""One leader at a time, by the record's age on one's own clock; all in virtual time."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.api_server import ApiServer
from tests.unit.virtual_time import in_virtual_time

from voicepool.kube.api import LEASES, Forbidden, Json, KubeApi, Resource, Unreachable
from voicepool.kube.lease import Election, LeaseRecord, LeaseTimes, Step, lease_spec, next_step

NAME = "voicepool-operator"
NOW = datetime(2026, 3, 1, 12, 0, 0, 250, tzinfo=UTC)


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        in_virtual_time(test(*arguments, **named))

    return run


def record(holder: str = "other", duration_seconds: float = 15, transitions: int = 3) -> LeaseRecord:
    return LeaseRecord("7", holder, duration_seconds, "2026-03-01T11:00:00.000000Z", transitions)


class TestDecision:
    def test_a_missing_lease_is_made(self) -> None:
        assert next_step(None, 0, "me") is Step.CREATE

    def test_a_lease_that_changed_lately_is_left_alone(self) -> None:
        assert next_step(record(), 14.9, "me") is Step.WAIT

    def test_a_lease_that_has_not_changed_for_its_duration_is_taken(self) -> None:
        assert next_step(record(), 15, "me") is Step.TAKE

    def test_the_duration_of_its_holder_counts(self) -> None:
        assert next_step(record(duration_seconds=60), 59, "me") is Step.WAIT

    def test_a_lease_that_was_given_back_is_taken_at_once(self) -> None:
        assert next_step(record(holder=""), 0, "me") is Step.TAKE

    def test_our_own_lease_is_renewed_whatever_its_age(self) -> None:
        assert next_step(record(holder="me"), 1000, "me") is Step.RENEW

    @given(
        st.floats(min_value=0, max_value=1e6), st.floats(min_value=1, max_value=3600), st.sampled_from(["", "a", "b"])
    )
    def test_a_lease_of_somebody_else_is_never_taken_early(self, age: float, duration: float, holder: str) -> None:
        step = next_step(record(holder, duration), age, "a")
        assert step is not Step.TAKE or not holder or (holder == "b" and age >= duration)

    def test_taking_counts_a_transition_and_begins_anew(self) -> None:
        spec = lease_spec(Step.TAKE, record(), "me", 15, NOW)
        assert spec == {
            "holderIdentity": "me",
            "leaseDurationSeconds": 15,
            "acquireTime": "2026-03-01T12:00:00.000250Z",
            "renewTime": "2026-03-01T12:00:00.000250Z",
            "leaseTransitions": 4,
        }

    def test_renewing_keeps_count_and_beginning(self) -> None:
        spec = lease_spec(Step.RENEW, record(holder="me"), "me", 15, NOW)
        assert (spec["acquireTime"], spec["leaseTransitions"]) == ("2026-03-01T11:00:00.000000Z", 3)
        assert spec["renewTime"] == "2026-03-01T12:00:00.000250Z"

    @pytest.mark.parametrize(
        "spec",
        [{}, {"leaseDurationSeconds": 0}, {"leaseDurationSeconds": -5}, {"leaseDurationSeconds": 10**9}],
    )
    def test_a_record_without_sense_gets_our_own_duration(self, spec: Json) -> None:
        read = LeaseRecord.from_json({"metadata": {"resourceVersion": "1"}, "spec": spec}, 15)
        assert (read.duration_seconds, read.holder) == (15, "")

    def test_times_that_would_allow_two_leaders_are_refused(self) -> None:
        with pytest.raises(ValueError, match="must hold"):
            LeaseTimes(duration_seconds=10, renew_deadline_seconds=10)


class Network:
    """The way from one candidate to the API server."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self.down = False
        self.hangs = False
        self.answers_lost = 0
        self.forbidden = False

    async def _pass(self, write: bool, call: Callable[[], Awaitable[Json]]) -> Json:
        await asyncio.sleep(0.01)
        if self.hangs:
            await asyncio.Event().wait()
        if self.down:
            raise Unreachable("connection refused")
        if self.forbidden:
            raise Forbidden("leases is forbidden", status=403)
        answer = await call()
        if write and self.answers_lost:
            self.answers_lost -= 1
            raise Unreachable("connection reset")
        await asyncio.sleep(0.01)
        return answer

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        return await self._pass(False, lambda: self._server.get(resource, namespace, name))

    async def create(self, resource: Resource, namespace: str, body: Mapping[str, Any]) -> Json:
        return await self._pass(True, lambda: self._server.create(resource, namespace, body))

    async def merge_patch(self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any]) -> Json:
        return await self._pass(True, lambda: self._server.merge_patch(resource, namespace, name, body))


class World:
    """Candidates, what each does, and who did so together with whom."""

    def __init__(self) -> None:
        self.server = ApiServer()
        self.networks: dict[str, Network] = {}
        self.elections: dict[str, Election] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.working: set[str] = set()
        self.together: list[set[str]] = []
        self.begun: list[tuple[str, float]] = []
        self.changes: list[tuple[str, bool]] = []

    def add(self, identity: str) -> Election:
        network = self.networks[identity] = Network(self.server)
        election = Election(
            _as_api(network),
            "voicepool",
            NAME,
            identity,
            clock=asyncio.get_running_loop().time,
            now=lambda: NOW,
            jitter=random.Random(identity),
            on_change=lambda leading: self.changes.append((identity, leading)),
        )
        self.elections[identity] = election
        self.tasks[identity] = asyncio.create_task(election.run(lambda: self._work(identity)))
        return election

    async def _work(self, identity: str) -> None:
        self.working.add(identity)
        self.begun.append((identity, asyncio.get_running_loop().time()))
        if len(self.working) > 1:
            self.together.append(set(self.working))
        try:
            await asyncio.Event().wait()
        finally:
            self.working.discard(identity)

    async def stop(self, *identities: str) -> None:
        for identity in identities or tuple(self.tasks):
            self.tasks[identity].cancel()
            await asyncio.gather(self.tasks[identity], return_exceptions=True)

    def lease(self) -> Json:
        return dict(self.server.objects["leases", "voicepool", NAME]["spec"])

    def leader(self) -> str:
        assert len(self.working) == 1, self.working
        return next(iter(self.working))


def _as_api(network: Any) -> KubeApi:
    api: KubeApi = network
    return api


async def two() -> tuple[World, str, str]:
    """Two candidates, of which the first leads."""
    world = World()
    world.add("a")
    await asyncio.sleep(1)
    world.add("b")
    await asyncio.sleep(30)
    assert world.leader() == "a"
    return world, "a", "b"


@virtual
async def test_the_first_one_makes_the_lease_and_keeps_it() -> None:
    world, first, second = await two()
    await asyncio.sleep(3600)
    assert world.begun == [(first, world.begun[0][1])]
    assert world.lease()["holderIdentity"] == first
    assert world.lease()["leaseTransitions"] == 0
    assert world.elections[second].holder == first
    await world.stop()


@virtual
async def test_of_many_that_begin_at_once_one_leads() -> None:
    world = World()
    for number in range(20):
        world.add(f"candidate-{number}")
    await asyncio.sleep(60)
    assert len(world.begun) == 1
    await world.stop()
    assert world.together == []


@virtual
async def test_a_candidate_writes_nothing() -> None:
    world, first, second = await two()
    world.networks[first].hangs = True
    before = len(world.server.calls)
    await asyncio.sleep(4)
    assert len(world.server.calls) == before
    assert not world.elections[second].leading()
    await world.stop(second)
    world.tasks[first].cancel()
    await asyncio.gather(*world.tasks.values(), return_exceptions=True)


@virtual
async def test_when_the_leader_is_cut_off_it_stops_before_the_other_begins() -> None:
    world, first, second = await two()
    world.networks[first].down = True
    cut_at = asyncio.get_running_loop().time()
    await asyncio.sleep(10.1)
    assert world.working == set()
    await asyncio.sleep(10)
    assert world.leader() == second
    assert 13 <= world.begun[-1][1] - cut_at < 20
    assert world.lease()["leaseTransitions"] == 1
    world.networks[first].down = False
    await asyncio.sleep(60)
    assert world.leader() == second
    assert world.together == []
    await world.stop()


@virtual
async def test_a_leader_whose_requests_hang_stops_as_early_as_one_that_is_refused() -> None:
    world, first, second = await two()
    world.networks[first].hangs = True
    await asyncio.sleep(10.1)
    assert world.working == set()
    await asyncio.sleep(10)
    assert world.leader() == second
    assert world.together == []
    await world.stop(second)


@virtual
async def test_a_short_interruption_is_no_loss() -> None:
    world, first, _second = await two()
    world.networks[first].down = True
    await asyncio.sleep(6)
    world.networks[first].down = False
    await asyncio.sleep(60)
    assert world.changes == [(first, True)]
    await world.stop()


@virtual
async def test_a_lost_lease_is_won_again() -> None:
    world = World()
    election = world.add("a")
    await asyncio.sleep(5)
    world.networks["a"].down = True
    await asyncio.sleep(30)
    assert (world.working, election.leading()) == (set(), False)
    world.networks["a"].down = False
    await asyncio.sleep(3)
    assert world.leader() == "a"
    assert world.changes == [("a", True), ("a", False), ("a", True)]
    await world.stop()


@virtual
async def test_given_back_on_a_clean_stop_it_is_taken_within_two_seconds() -> None:
    world, first, second = await two()
    stopped_at = asyncio.get_running_loop().time()
    await world.stop(first)
    assert world.lease()["holderIdentity"] == ""
    await asyncio.sleep(2)
    assert world.leader() == second
    assert world.begun[-1][1] - stopped_at < 2
    await world.stop()


@virtual
async def test_the_work_has_ended_before_the_lease_is_given_back() -> None:
    world = World()
    holders: list[str] = []

    async def slow_to_stop() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)
            holders.append(world.lease()["holderIdentity"])

    election = world.add("a")
    await world.stop("a")
    task = asyncio.create_task(election.run(slow_to_stop))
    await asyncio.sleep(3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert holders == ["a"]
    assert world.lease()["holderIdentity"] == ""


@virtual
async def test_a_renewal_whose_answer_is_lost_is_no_loss() -> None:
    world, first, _second = await two()
    world.networks[first].answers_lost = 3
    await asyncio.sleep(60)
    assert world.changes == [(first, True)]
    assert world.lease()["leaseTransitions"] == 0
    await world.stop()


@virtual
async def test_an_acquisition_whose_answer_is_lost_is_found_by_reading() -> None:
    world = World()
    world.add("a")
    world.networks["a"].answers_lost = 1
    await asyncio.sleep(5)
    assert world.leader() == "a"
    await world.stop()


@virtual
async def test_a_renewal_that_was_cut_off_by_stopping_does_not_keep_the_lease() -> None:
    world, first, _second = await two()
    world.networks[first].answers_lost = 1
    await asyncio.sleep(2)
    await world.stop(first)
    assert world.lease()["holderIdentity"] == ""
    await world.stop()


@virtual
async def test_a_lease_that_somebody_else_was_given_stops_the_work_at_the_next_renewal() -> None:
    world, first, _second = await two()
    world.server.change(LEASES, NAME, "voicepool", spec={"holderIdentity": "a person"})
    await asyncio.sleep(2.1)
    assert world.working == set()
    assert not world.elections[first].leading()
    assert world.lease()["holderIdentity"] == "a person"
    await asyncio.sleep(20)
    assert len(world.working) == 1
    await world.stop()


@virtual
async def test_a_lease_that_was_deleted_is_made_again_by_its_leader() -> None:
    world, first, _second = await two()
    world.server.vanish(LEASES, NAME, "voicepool")
    await asyncio.sleep(30)
    assert world.changes == [(first, True)]
    assert world.lease()["holderIdentity"] == first
    assert world.together == []
    await world.stop()


@virtual
async def test_a_process_that_was_frozen_does_not_believe_that_it_still_leads() -> None:
    world = World()
    frozen_seconds = 0.0
    loop = asyncio.get_running_loop()
    network = world.networks["a"] = Network(world.server)
    election = Election(
        _as_api(network), "voicepool", NAME, "a", clock=lambda: loop.time() + frozen_seconds, now=lambda: NOW
    )
    task = asyncio.create_task(election.run(lambda: world._work("a")))
    await asyncio.sleep(5)
    answers = [election.leading()]
    frozen_seconds = 30.0
    # Before any task of it has had a turn.
    answers.append(election.leading())
    assert answers == [True, False]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@virtual
async def test_work_that_fails_ends_it_and_the_lease_is_given_back() -> None:
    world = World()

    async def fail() -> None:
        await asyncio.sleep(3)
        raise ValueError("a fault of ours")

    election = Election(
        _as_api(Network(world.server)), "voicepool", NAME, "a", clock=asyncio.get_running_loop().time, now=lambda: NOW
    )
    with pytest.raises(ValueError, match="a fault of ours"):
        await election.run(fail)
    assert world.lease()["holderIdentity"] == ""


@virtual
async def test_an_error_of_work_that_is_being_stopped_is_told_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    begun: list[float] = []

    async def stumble() -> None:
        begun.append(asyncio.get_running_loop().time())
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("a fault of ours")

    network = Network(world.server)
    election = Election(
        _as_api(network), "voicepool", NAME, "a", clock=asyncio.get_running_loop().time, now=lambda: NOW
    )
    task = asyncio.create_task(election.run(stumble))
    await asyncio.sleep(5)
    network.down = True
    await asyncio.sleep(15)
    network.down = False
    await asyncio.sleep(5)
    assert len(begun) == 2
    assert "the work ended with an error when it was stopped" in caplog.messages
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@virtual
async def test_a_missing_right_is_told_and_does_not_end_the_process() -> None:
    world = World()
    election = world.add("a")
    world.networks["a"].forbidden = True
    await asyncio.sleep(10)
    assert "forbidden" in str(election.error)
    assert election.silence_seconds() == float("inf")
    world.networks["a"].forbidden = False
    await asyncio.sleep(2)
    assert str(election.error) == "None"
    assert election.silence_seconds() < 3
    assert world.leader() == "a"
    await world.stop()


@pytest.mark.parametrize("seed", range(12))
@virtual
async def test_whatever_the_network_does_two_never_work_together(seed: int) -> None:
    chance = random.Random(seed)
    world = World()
    for identity in ("a", "b", "c"):
        world.add(identity)
    for _ in range(100):
        network = world.networks[chance.choice("abc")]
        match chance.randrange(5):
            case 0:
                network.down = not network.down
            case 1:
                network.hangs = not network.hangs
            case 2:
                network.answers_lost = chance.randrange(3)
            case _:
                network.down = network.hangs = False
        await asyncio.sleep(chance.uniform(0, 8))
    for network in world.networks.values():
        network.down = network.hangs = False
    await asyncio.sleep(40)
    assert len(world.working) == 1
    assert world.together == []
    await world.stop()
