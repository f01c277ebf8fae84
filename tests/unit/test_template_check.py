"""How long a refused template is believed to be one."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from tests.unit.facts import pool
from tests.unit.virtual_time import in_virtual_time

from voicepool.kube.api import Forbidden, KubeApi, KubeApiError
from voicepool.podspec import PodSettings
from voicepool.template_check import TemplateCheck

KEY = ("calls", "demo")
NO_ACCOUNT = 'error looking up service account calls/default: serviceaccount "default" not found'
NO_RIGHTS = 'User "operator" cannot create resource "pods"'


class Refusing:
    """An API server that refuses what it is told to, in this order, and takes all else."""

    def __init__(self, *words: str) -> None:
        self.errors: list[KubeApiError] = [Forbidden(one, status=403) for one in words]
        self.asked = 0

    async def create(self, *what: Any, **how: Any) -> None:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)


def waits_of(api: Refusing, count: int, **changes: Any) -> list[float]:
    """How many seconds each of so many refusals is believed; in between it is asked too early, too."""

    async def seen() -> list[float]:
        check = TemplateCheck(cast("KubeApi", api), PodSettings("key"))
        waits = []
        for number in range(1, count + 1):
            assert (await check.check(pool(**changes))).error
            waits.append(check.asked_again_after_seconds(KEY))
            await asyncio.sleep(waits[-1] / 2)
            await check.check(pool(**changes))
            assert api.asked == number, "a refusal is believed for a while"
            await asyncio.sleep(waits[-1] / 2)
        return waits

    return in_virtual_time(seen())


def test_a_refusal_is_asked_about_after_a_second_and_then_ever_later() -> None:
    assert waits_of(Refusing(*[NO_ACCOUNT] * 6), 6) == [1, 2, 4, 8, 15, 15]


def test_a_template_that_is_refused_for_hours_is_asked_about_as_often() -> None:
    assert waits_of(Refusing(*[NO_ACCOUNT] * 1_100), 1_100)[-1] == 15


def test_rights_that_are_not_known_yet_are_asked_about_each_second() -> None:
    assert waits_of(Refusing(*[NO_RIGHTS] * 4), 4) == [1, 1, 1, 1]


def test_what_was_taken_is_not_asked_about_again_and_another_template_begins_anew() -> None:
    async def seen() -> None:
        check = TemplateCheck(cast("KubeApi", api := Refusing()), PodSettings("key"))
        for _ in range(2):
            assert (await check.check(pool())).error is None
        assert api.asked == 1
        for seconds in (1, 2):
            hash_ = (await check.check(pool())).hash
            for _ in range(3):
                check.refused(pool(), hash_, NO_ACCOUNT)
            assert check.asked_again_after_seconds(KEY) == seconds, "creates that went out together are one refusal"
            await asyncio.sleep(seconds)
        api.errors = [Forbidden(NO_ACCOUNT, status=403)]
        other = pool(template={"spec": {"containers": [{"name": "agent", "image": "another"}]}})
        assert (await check.check(other)).error
        assert check.asked_again_after_seconds(KEY) == 1

    in_virtual_time(seen())
