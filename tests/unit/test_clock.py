"""The API server's time, from what its answers say."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from voicepool.kube.api import PODS, ServerFault
from voicepool.kube.client import AiohttpKubeApi
from voicepool.kube.clock import ServerClock

TRUE = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Machine:
    """A machine whose clock is wrong, and an API server whose clock is right."""

    def __init__(self, wrong_seconds: float = 0.0) -> None:
        self.seconds = 1000.25
        self.wrong_seconds = wrong_seconds
        self.clock = ServerClock(lambda: self.true() + timedelta(seconds=self.wrong_seconds), lambda: self.seconds)

    def true(self) -> datetime:
        return TRUE + timedelta(seconds=self.seconds)

    def ask(self, way_seconds: float = 0.0) -> None:
        asked_at = self.seconds
        self.seconds += way_seconds / 2
        date = format_datetime(self.true(), usegmt=True)
        self.seconds += way_seconds / 2
        self.clock.heard(date, asked_at)

    def error_seconds(self) -> float:
        return (self.clock.now() - self.true()).total_seconds()


def test_until_the_first_answer_this_machines_clock_holds() -> None:
    assert Machine(wrong_seconds=-60).error_seconds() == -60


def test_a_clock_that_is_right_is_left_alone() -> None:
    machine = Machine()
    for _ in range(10):
        machine.ask(way_seconds=0.3)
    assert machine.error_seconds() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("wrong_seconds", [-3600.0, -2.0, 2.0, 3600.0])
def test_after_one_answer_no_clock_is_wrong_by_more_than_a_second_and_the_way(wrong_seconds: float) -> None:
    machine = Machine(wrong_seconds)
    machine.ask(way_seconds=0.5)
    assert abs(machine.error_seconds()) <= 1.5


@pytest.mark.parametrize("wrong_seconds", [-3600.0, 3600.0])
def test_with_each_answer_it_is_more_exact(wrong_seconds: float) -> None:
    machine = Machine(wrong_seconds)
    for _ in range(40):
        machine.seconds += 7.03
        machine.ask(way_seconds=0.02)
    assert abs(machine.error_seconds()) <= 0.06


def test_a_machine_whose_clock_is_set_meanwhile_does_not_notice() -> None:
    machine = Machine()
    machine.ask()
    machine.wrong_seconds = 3600.0
    assert machine.error_seconds() == pytest.approx(0.0, abs=1e-5)


def test_a_machine_that_was_suspended_is_right_with_the_next_answer() -> None:
    machine = Machine()
    machine.ask()
    # Its monotonic clock has stood still for an hour.
    machine.clock.heard(format_datetime(machine.true() + timedelta(hours=1), usegmt=True), machine.seconds)
    assert machine.error_seconds() == pytest.approx(3600.0, abs=1.0)


@pytest.mark.parametrize("date", [None, "", "yesterday", "Sun, 99 Foo 2026 12:00:00 GMT"])
def test_what_is_no_date_proves_nothing(date: str | None) -> None:
    machine = Machine(wrong_seconds=60)
    machine.clock.heard(date, machine.seconds)
    assert machine.error_seconds() == 60


def test_a_clock_that_is_far_off_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(wrong_seconds=60)
    with caplog.at_level(logging.WARNING):
        machine.ask()
        machine.ask()
    (record,) = caplog.records
    assert record.__dict__["seconds_ahead"] == pytest.approx(60.0, abs=1.0)


@pytest.mark.parametrize("status", [200, 500])
async def test_every_answer_of_the_api_server_sets_the_clock(status: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({}, status=status, headers={"Date": "Sun, 01 Mar 2026 12:00:00 GMT"})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app) as server:
        api = AiohttpKubeApi(ClientSession(base_url=server.make_url("/")))
        async with api:
            try:
                await api.get(PODS, "calls", "one")
            except ServerFault:
                assert status == 500
            assert abs((api.clock.now() - TRUE).total_seconds()) < 60
