"""The session's record: what `kubectl describe pod` shows as the termination message, once the process has exited.

Kubernetes keeps at most 4096 bytes of it. Invariants: the summary is always whole JSON within that limit (errors give
way, the first of them last); a failed build is one line of text; neither holds words that were spoken, tokens or keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

MAX_BYTES = 4096


class Reason(StrEnum):
    """Why a session ended; the first cause counts."""

    CALLER_LEFT = "caller-left"
    BOT_ENDED = "bot-ended"
    BOT_FAILED = "bot-failed"
    MAX_DURATION = "max-duration"
    NOBODY_JOINED = "nobody-joined"
    IDLE = "idle"
    DRAINED = "drained"
    CANCELLED = "cancelled"
    NOT_JOINED = "not-joined"
    LIVEKIT_LOST = "livekit-lost"
    ROOM_CLOSED = "room-closed"
    REPLACED = "replaced"
    PROVIDER_FAILED = "provider-failed"
    STUCK = "stuck"

    @property
    def allows_last_words(self) -> bool:
        """Whether the caller may still be listening, and there is time: the agent finishes what it says, and says goodbye."""
        return self in (Reason.DRAINED, Reason.MAX_DURATION, Reason.PROVIDER_FAILED)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a session used of its providers; None where no service has measured it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    characters: int | None = None
    heard_seconds: float | None = None

    def as_dictionary(self) -> dict[str, float | None]:
        """With the summary's names."""
        return {
            "llmPromptTokens": self.prompt_tokens,
            "llmCompletionTokens": self.completion_tokens,
            "ttsCharacters": self.characters,
            "sttAudioSeconds": _rounded(self.heard_seconds),
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """One session. Times are seconds from the bind on; None where it never came to that."""

    session: str
    reason: Reason
    duration_seconds: float
    turns: int
    joined_seconds: float | None
    first_audio_seconds: float | None
    errors: tuple[str, ...] = ()
    interruptions: int = 0
    usage: Usage = Usage()

    def as_json(self) -> str:
        """Compact JSON of at most 4096 bytes in UTF-8."""
        errors = list(self.errors)
        while len((text := self._dump(errors)).encode()) > MAX_BYTES and errors:
            errors.pop()
        return text

    def _dump(self, errors: list[str]) -> str:
        left_out = len(self.errors) - len(errors)
        shown = [*errors, f"and {left_out} more"] if left_out else errors
        text = json.dumps(
            {
                "session": self.session,
                "reason": self.reason.value,
                "durationSeconds": round(self.duration_seconds, 3),
                "turns": self.turns,
                "joinedSeconds": _rounded(self.joined_seconds),
                "firstAudioSeconds": _rounded(self.first_audio_seconds),
                "interruptions": self.interruptions,
                "usage": self.usage.as_dictionary(),
                "errors": shown,
            },
            separators=(",", ":"),
            ensure_ascii=False,  # six bytes for a letter would leave less room for errors
        )
        return text.encode(errors="replace").decode()  # half a surrogate pair, which is no text


def write_termination_message(path: Path, text: str) -> str | None:
    """Write the message where the kubelet reads it; returns what went wrong, if anything did."""
    try:
        path.write_bytes(text.encode(errors="replace")[:MAX_BYTES])
    except OSError as error:
        return f"cannot write the termination message: {error}"
    return None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
