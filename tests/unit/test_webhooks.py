"""Webhooks: what a receiver on a real socket gets, and that it can verify it by nothing but the Standard Webhooks specification."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.unit.facts import NOW, bound, ended, warm
from tests.unit.gateways import until

from voicepool.events import Happening, Kind, happenings
from voicepool.settings import OperatorSettings, SettingsError
from voicepool.webhooks import (
    REPEAT_SECONDS,
    WebhookLimits,
    Webhooks,
    WebhookSecretError,
    make_webhook_session,
    message_of,
    recent,
    secrets_of,
)

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
SUMMARY = json.dumps({"session": "session-0", "reason": "caller-left", "turns": 3}, separators=(",", ":"))
QUICK = WebhookLimits(first_retry_seconds=0.01, max_retry_seconds=0.04, give_up_seconds=0.3, timeout_seconds=0.5)


def verified(headers: Any, body: bytes, key: bytes) -> bool:
    """As the specification has it: HMAC-SHA256 of "id.timestamp.body", base64, among the signatures of version 1."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return any(hmac.compare_digest(expected, given) for given in headers["webhook-signature"].split(" "))


class Receiver:
    """Somebody else's server."""

    def __init__(self) -> None:
        self.got: list[tuple[Any, bytes]] = []
        self.answers: list[web.StreamResponse] = []
        """What the next messages are answered with; then they are taken."""
        self.hold: asyncio.Event | None = None
        self.elsewhere = 0
        self.url = ""

    async def hook(self, request: web.Request) -> web.StreamResponse:
        self.got.append((request.headers, await request.read()))
        if self.hold is not None:
            await self.hold.wait()
        return self.answers.pop(0) if self.answers else web.Response(status=204)

    async def other(self, request: web.Request) -> web.Response:
        self.elsewhere += 1
        return web.Response()

    def types(self) -> list[str]:
        return [json.loads(body)["type"] for _, body in self.got]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    it = Receiver()
    app = web.Application()
    app.router.add_post("/hook", it.hook)
    app.router.add_route("*", "/{path:.*}", it.other)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    it.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield it
    await runner.cleanup()


@contextlib.asynccontextmanager
async def sender(
    receiver: Receiver, folder: Path, outcomes: list[str], limits: WebhookLimits = QUICK
) -> AsyncIterator[Webhooks]:
    file = folder / "secret"
    if not file.exists():
        file.write_text(SECRET + "\n")
    async with make_webhook_session() as http:
        made = Webhooks(
            http,
            receiver.url,
            file,
            lambda: NOW,
            on_told=outcomes.append,
            limits=limits,
            jitter=random.Random(1),
        )
        task = asyncio.create_task(made.run())
        yield made
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def started(number: int = 0) -> Happening:
    return Happening(Kind.SESSION_STARTED, bound(number, bound_at=NOW - timedelta(seconds=3)))


async def test_a_session_that_ends_is_told_so_that_its_receiver_can_verify_it(
    receiver: Receiver, tmp_path: Path
) -> None:
    outcomes: list[str] = []
    before = bound(0, bound_at=NOW - timedelta(seconds=60))
    after = ended(0, 5, bound_at=NOW - timedelta(seconds=60), message=SUMMARY)
    async with sender(receiver, tmp_path, outcomes) as webhooks:
        for happening in happenings(before, after):
            webhooks.tell(happening)
        await until(lambda: outcomes == ["ok"])
    ((headers, body),) = receiver.got
    assert verified(headers, body, KEY)
    assert not verified(headers, body + b" ", KEY)
    assert not verified(headers, body, b"x" * 32)
    assert headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == {
        "type": "session.ended",
        "timestamp": "2026-03-01T11:59:55.000000Z",
        "data": {
            "sessionId": "session-0",
            "namespace": "calls",
            "pool": "demo",
            "reason": "caller-left",
            "createdAt": "2026-03-01T11:59:00.000000Z",
            "endedAt": "2026-03-01T11:59:55.000000Z",
            "coldStart": False,
            "summary": {"session": "session-0", "reason": "caller-left", "turns": 3},
        },
    }


def test_the_signature_is_that_of_the_specifications_own_example() -> None:
    from voicepool.webhooks import Message, headers_of

    # The example of the specification's reference implementations.
    key = secrets_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    now = NOW.fromtimestamp(1614265330, tz=NOW.tzinfo)
    headers = headers_of(Message("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}'), key, now)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    ("happening", "kind", "reason"),
    [
        (started(), "session.started", None),
        (Happening(Kind.SESSION_DROPPED, bound(0), "deleted"), "session.dropped", "deleted"),
        (Happening(Kind.SESSION_UNDELIVERED, bound(0), "undelivered"), "session.dropped", "undelivered"),
    ],
)
def test_each_beginning_and_end_has_a_type_and_a_reason(happening: Happening, kind: str, reason: str | None) -> None:
    message = message_of(happening, NOW)
    assert message is not None
    body = json.loads(message.body)
    assert (body["type"], body["data"]["reason"]) == (kind, reason)


def test_what_happens_to_warm_pods_is_not_told() -> None:
    assert message_of(Happening(Kind.BECAME_WARM, warm(0)), NOW) is None


def test_what_happened_once_has_one_id_whoever_tells_it() -> None:
    def id_of(happening: Happening) -> str:
        message = message_of(happening, NOW)
        assert message is not None
        return message.id

    pod = ended(0, 5, message=SUMMARY)
    assert id_of(Happening(Kind.SESSION_ENDED, pod, "idle")) == id_of(Happening(Kind.SESSION_DROPPED, pod, "crashed"))
    assert id_of(started()) == id_of(started())
    assert len({id_of(started(0)), id_of(started(1)), id_of(Happening(Kind.SESSION_ENDED, pod, "idle"))}) == 3


def test_an_operator_that_begins_tells_again_what_has_just_happened_and_nothing_older() -> None:
    recently, before = NOW - timedelta(seconds=5), NOW - timedelta(seconds=REPEAT_SECONDS + 1)
    pods = [
        bound(0, bound_at=recently),
        ended(1, 5, bound_at=before, message=SUMMARY),
        bound(2, bound_at=before),
        ended(3, REPEAT_SECONDS + 1, bound_at=before),
        warm(4),
    ]
    told = [(happening.kind, happening.pod.session) for happening in recent(pods, NOW)]
    assert told == [(Kind.SESSION_STARTED, "session-0"), (Kind.SESSION_ENDED, "session-1")]


async def test_a_receiver_that_fails_gets_the_same_message_again_with_the_same_id(
    receiver: Receiver, tmp_path: Path
) -> None:
    outcomes: list[str] = []
    receiver.answers = [web.Response(status=500), web.Response(status=429)]
    async with sender(receiver, tmp_path, outcomes) as webhooks:
        webhooks.tell(started())
        await until(lambda: outcomes)
    assert outcomes == ["ok"]
    assert len(receiver.got) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({body for _, body in receiver.got}) == 1


async def test_a_message_that_nobody_takes_is_given_up_in_time(
    receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[str] = []
    receiver.answers = [web.Response(status=503) for _ in range(100)]
    with caplog.at_level(logging.WARNING):
        async with sender(receiver, tmp_path, outcomes) as webhooks:
            webhooks.tell(started())
            await until(lambda: outcomes)
    assert outcomes == ["failed"]
    assert 3 <= len(receiver.got) < 30
    assert SECRET not in caplog.text
    assert receiver.url not in caplog.text


async def test_a_receiver_that_is_gone_for_good_is_not_asked_again(receiver: Receiver, tmp_path: Path) -> None:
    outcomes: list[str] = []
    receiver.answers = [web.Response(status=410)]
    async with sender(receiver, tmp_path, outcomes) as webhooks:
        webhooks.tell(started())
        await until(lambda: outcomes)
    assert (outcomes, len(receiver.got)) == (["failed"], 1)


async def test_a_redirect_is_a_failure_and_is_not_followed(receiver: Receiver, tmp_path: Path) -> None:
    outcomes: list[str] = []
    receiver.answers = [web.Response(status=307, headers={"Location": "/elsewhere"})]
    async with sender(receiver, tmp_path, outcomes) as webhooks:
        webhooks.tell(started())
        await until(lambda: outcomes)
    assert (outcomes, receiver.elsewhere, len(receiver.got)) == (["ok"], 0, 2)


async def test_a_receiver_that_does_not_answer_is_not_waited_for(receiver: Receiver, tmp_path: Path) -> None:
    outcomes: list[str] = []
    receiver.hold = asyncio.Event()
    limits = WebhookLimits(timeout_seconds=0.05, first_retry_seconds=0.01, give_up_seconds=0.0)
    async with sender(receiver, tmp_path, outcomes, limits) as webhooks:
        webhooks.tell(started())
        await until(lambda: outcomes)
    assert outcomes == ["failed"]
    receiver.hold.set()


async def test_more_than_may_wait_is_dropped_and_counted(receiver: Receiver, tmp_path: Path) -> None:
    outcomes: list[str] = []
    receiver.hold = asyncio.Event()
    limits = WebhookLimits(pending=5)
    async with sender(receiver, tmp_path, outcomes, limits) as webhooks:
        for number in range(8):
            webhooks.tell(started(number))
        assert outcomes == ["dropped"] * 3
        receiver.hold.set()
        await until(lambda: len(outcomes) == 8)
        webhooks.tell(started(9))
        await until(lambda: len(outcomes) == 9)
    assert outcomes.count("ok") == 6


async def test_one_message_that_must_be_tried_again_does_not_hold_up_the_others(
    receiver: Receiver, tmp_path: Path
) -> None:
    outcomes: list[str] = []
    receiver.answers = [web.Response(status=500) for _ in range(6)]
    limits = WebhookLimits(first_retry_seconds=3600.0, max_retry_seconds=3600.0, give_up_seconds=7200.0)
    async with sender(receiver, tmp_path, outcomes, limits) as webhooks:
        for number in range(6):
            webhooks.tell(started(number))
        await until(lambda: len(receiver.got) == 6)
        webhooks.tell(started(7))
        await until(lambda: outcomes == ["ok"])


async def test_a_new_secret_is_used_without_a_restart_and_two_sign_both(receiver: Receiver, tmp_path: Path) -> None:
    outcomes: list[str] = []
    other = b"y" * 24
    async with sender(receiver, tmp_path, outcomes) as webhooks:
        webhooks.tell(started(0))
        await until(lambda: len(outcomes) == 1)
        (tmp_path / "secret").write_text(f"whsec_{base64.b64encode(other).decode()}\n{SECRET}\n")
        webhooks.tell(started(1))
        await until(lambda: len(outcomes) == 2)
    (_, _), (headers, body) = receiver.got
    assert verified(headers, body, KEY)
    assert verified(headers, body, other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no secret"),
        ("bm90IG91cnM=", "must begin with 'whsec_'"),
        ("whsec_***", "base64"),
        ("whsec_c2hvcnQ=", "24 to 64 bytes"),
    ],
)
def test_a_bad_secret_is_named_without_being_shown(text: str, words: str) -> None:
    with pytest.raises(WebhookSecretError, match=words) as caught:
        secrets_of(text)
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"VOICEPOOL_WEBHOOK_URL": "https://example.com/hook"}, "WEBHOOK_SECRET_FILE must be set"),
        ({"VOICEPOOL_WEBHOOK_SECRET_FILE": "/secret"}, "WEBHOOK_URL must be set"),
        ({"VOICEPOOL_WEBHOOK_URL": "file:///etc", "VOICEPOOL_WEBHOOK_SECRET_FILE": "/secret"}, "must be an address"),
        ({"VOICEPOOL_WEBHOOK_URL": "http://a:b@c/", "VOICEPOOL_WEBHOOK_SECRET_FILE": "/secret"}, "no name or password"),
    ],
)
def test_half_a_setting_or_a_bad_address_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        OperatorSettings.from_environment({"VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE": "key.pem"} | variables)
