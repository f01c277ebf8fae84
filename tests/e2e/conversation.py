"""One call to a deployed voicepool, from the request to the last answer, and its timeline.

Invariants: the caller's program knows an address and an API key, nothing else of the cluster; all times are seconds since the request was sent; speech
is transcribed while nobody speaks, so that it takes no processor time from the agent on the same machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.e2e.caller import HEARD_RATE, Caller, Utterance, read_wav
from tests.e2e.deployment import Answer, Deployment

RECORDINGS = Path(__file__).parent / "recordings"
OPENING_HOURS = RECORDINGS / "opening-hours.wav"
OPENING_HOURS_WORDS = "What are your opening hours?"

PAUSE = bytes(2 * HEARD_RATE // 4)
"""A quarter of a second of silence between two parts of what was said."""

HEAR_SECONDS = 60.0
"""How long the caller waits for the agent to say something, and to end it."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened, in seconds since the request."""

    what: str
    seconds: float


class Conversation:
    """A caller in the room of a session.

    Args:
        deployment: what runs the session.
        caller: in the room.
        session: what the gateway answered.
    """

    def __init__(self, deployment: Deployment, caller: Caller, session: Answer) -> None:
        self._deployment, self.caller, self.session = deployment, caller, session
        self.questions: list[Moment] = []
        self.answers: list[Moment] = []

    async def listen(self) -> Utterance:
        """The next thing that the agent says.

        Raises:
            ClusterError: nothing is heard in time.
        """
        try:
            return await self.caller.hear(timeout_seconds=HEAR_SECONDS)
        except TimeoutError:
            raise await self.failure(f"was not heard within {HEAR_SECONDS:g} s") from None

    async def ask(self, recording: Path = OPENING_HOURS) -> Utterance:
        """Play a recorded question and hear the answer: what begins after it. Raises ClusterError."""
        pcm, rate = await asyncio.to_thread(read_wav, recording)
        try:
            await self.caller.wait_until_listened_to()
        except TimeoutError:
            raise await self.failure("does not listen to the caller") from None
        await self.caller.say(pcm, rate)
        asked = time.monotonic()
        self.questions.append(Moment("the question has been asked", asked - self.session.requested))
        answer = await self.listen()
        while answer.began < asked:  # the end of what the agent was still saying
            answer = await self.listen()
        self.answers.append(Moment("the answer begins", answer.began - self.session.requested))
        return answer

    async def failure(self, what: str) -> ClusterError:
        """What the agent did not do, with what the caller saw and what the agent has logged."""
        session = self.session.session_id
        seen = [f"{seconds - self.session.requested:.3f} s: {name}" for name, seconds in self.caller.timeline.items()]
        seen += [f"{one.seconds:.3f} s: {one.what}" for one in (*self.questions, *self.answers)]
        return ClusterError(
            f"the agent of session {session} {what}",
            f"see what it says: kubectl logs --selector voicepool.dev/session={session}",
            "\n".join(["what the caller saw, after the request:", *seen, await story_of(self._deployment, session)]),
        )

    def timeline(self) -> list[Moment]:
        """What happened, as the caller saw it, in order."""
        names = {
            "joined": "the caller is in the room",
            "agent-joined": "the agent is in the room",
            "first-audio": "first audio heard",
        }
        seen = [
            Moment(words, self.caller.timeline[name] - self.session.requested)
            for name, words in names.items()
            if name in self.caller.timeline
        ]
        answered = Moment("answered: an agent has accepted", self.session.seconds)
        return sorted([answered, *seen, *self.questions[:1], *self.answers[:1]], key=lambda one: one.seconds)


@contextlib.asynccontextmanager
async def call(deployment: Deployment, pool: str, *, timeout_seconds: float = 60) -> AsyncIterator[Conversation]:
    """Start a session and join its room; leaves at the end.

    Raises:
        ClusterError: there is no session, with the gateway's words; or the room cannot be joined.
    """
    session = await deployment.start(pool, timeout_seconds=timeout_seconds)
    if session.status != 200:
        raise ClusterError(
            f"the gateway refused a session of the pool {pool}: {session.status} {session.code}",
            f"kubectl get vpool {pool}; kubectl get pods",
            session.words,
        )
    caller = Caller(session.url, session.token)
    try:
        await caller.__aenter__()
    except Exception as error:  # the SDK raises a plain class of its own
        raise ClusterError(
            f"the room {session.room} at {session.url} cannot be joined ({error})",
            "does the LiveKit server run? kubectl get pods --namespace livekit",
        ) from None
    try:
        yield Conversation(deployment, caller, session)
    finally:
        await caller.leave()


async def story_of(deployment: Deployment, session_id: str) -> str:
    """The pod of a session and what its agent has logged, for an error."""
    selector = ("--selector", f"voicepool.dev/session={session_id}")

    def told() -> str:
        kubectl = deployment.cluster.kubectl
        return f"{kubectl('get', 'pods', *selector)}\n{kubectl('logs', *selector, '--tail=-1')}"

    try:
        return await asyncio.to_thread(told)
    except ClusterError as error:
        return str(error)


def offers_help(words: str) -> bool:
    """Whether the transcript of the keyless bot's greeting has its end."""
    return "help you" in words.lower()


def says_opening_hours(words: str) -> bool:
    """Whether the transcript of an answer is the answer to the recorded question."""
    return "morning" in words.lower() and "monday to friday" in words.lower().replace(",", "")


async def hear_out(first: Utterance, hear: Callable[[], Awaitable[Utterance]], says: Callable[[str], bool]) -> str:
    """Hear until the whole of something has been said, and return its words: a busy machine may make pauses in it.

    Args:
        first: how it begins.
        hear: the next utterance.
        says: whether a transcript has all of it.

    Raises:
        AssertionError: nothing more came, and this is what was said.
    """
    heard = first.pcm
    while not says(words := await words_of(heard)):
        try:
            heard += PAUSE + (await hear()).pcm
        except (TimeoutError, ClusterError):
            raise AssertionError(f"the agent has only said {words!r}") from None
    return words


async def words_of(pcm: bytes) -> str:
    """What is said in 16-bit samples at 16 kHz, by the local recogniser."""
    from tests.e2e.voice import transcribe  # takes a second, which a call need not wait for

    return await asyncio.to_thread(transcribe, pcm)
