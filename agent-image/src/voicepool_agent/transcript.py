"""Who said what, turn by turn: a turn is what one speaker says until another one does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

CALLER, AGENT = "caller", "agent"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn."""

    speaker: str
    identity: str | None
    """Of a caller, in the room."""
    at: datetime
    """When it began, with its zone."""
    seconds: float
    """The same, from the bind on: where it is in the recording."""
    text: str

    def as_line(self) -> str:
        """One line of JSON."""
        fields = {
            "speaker": self.speaker,
            "identity": self.identity,
            "at": self.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "seconds": round(self.seconds, 3),
            "text": self.text,
        }
        shown = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(shown, ensure_ascii=False) + "\n"


class Turns:
    """Makes turns of pieces of text."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[datetime, float]] = {}
        self._open: Turn | None = None
        self._spaced = True

    def began(self, speaker: str, at: datetime, seconds: float) -> None:
        """Somebody has begun to speak; the words come later."""
        self._began.setdefault(speaker, (at, seconds))

    def said(
        self,
        speaker: str,
        text: str,
        at: datetime,
        seconds: float,
        *,
        identity: str | None = None,
        spaced: bool = False,
    ) -> Turn | None:
        """Some words; returns the turn of somebody else that is over with that.

        Args:
            speaker: who.
            text: the words.
            at: now.
            seconds: the same, from the bind on.
            identity: of a caller.
            spaced: the pieces bring their spaces along.
        """
        if not text.strip():
            return None
        turn, over = self._open, None
        if turn is not None and (turn.speaker, turn.identity) != (speaker, identity):
            turn, over = None, self.end()
        if turn is None:
            at, seconds = self._began.get(speaker, (at, seconds))
            self._open = Turn(speaker, identity, at, seconds, text.strip())
        else:
            joint = "" if spaced and self._spaced else " "
            self._open = Turn(speaker, identity, turn.at, turn.seconds, turn.text + joint + text.rstrip())
        self._began.pop(speaker, None)
        self._spaced = spaced
        return over

    def end(self) -> Turn | None:
        """The turn that was still open, if there was one."""
        turn, self._open = self._open, None
        return turn
