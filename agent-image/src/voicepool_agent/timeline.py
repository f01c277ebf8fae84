"""What two sides of a call sound like at each moment, laid side by side as samples: no file, no clock.

Audio comes in pieces: a caller's as it is heard, an agent's faster than it is played. Invariants: pieces of one voice
that follow each other closely are joined without a gap; a longer pause is silence of its length, unless a voice that is late
catches up in it; what was taken is final.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
"""Samples per second of each side."""

JOINED_SECONDS = 0.2
"""Pieces that are no further apart belong together: a network is not a metronome."""

QUIET_RMS = 100.0
"""Loudness (root mean square of 16-bit samples) below which nobody speaks."""

Samples = NDArray[np.int16]


class Voice:
    """One voice, from the beginning of the call on.

    Args:
        catches_up: whether what comes late, and all at once, makes it late only until its next pause.
    """

    def __init__(self, *, catches_up: bool = False) -> None:
        self._catches_up = catches_up
        self._kept = np.zeros(0, np.int16)
        self._taken = 0
        self._quiet = 0
        """For how many samples it has been late, and said nothing."""

    @property
    def end(self) -> int:
        """The sample after the last one."""
        return self._taken + len(self._kept)

    def add(self, samples: Samples, at: int) -> None:
        """Add a piece at a moment, or right behind the last one if that was just before or is still to come."""
        silence = at - self.end
        late = self._catches_up and silence < -JOINED_SECONDS * RATE
        self._quiet = self._quiet + len(samples) if late and _is_quiet(samples) else 0
        if self._quiet > JOINED_SECONDS * RATE:  # a pause, and not within a word
            return
        if silence < JOINED_SECONDS * RATE:
            silence = 0
        self._kept = np.concatenate((self._kept, np.zeros(silence, np.int16), samples))

    def cut(self, at: int) -> None:
        """Forget what comes from this moment on: it was not played."""
        self._kept = self._kept[: max(0, at - self._taken)]

    def take(self, until: int) -> Samples:
        """Everything before this moment that was not taken yet, and silence for what is missing of it."""
        count = max(0, until - self._taken)
        taken, self._kept = self._kept[:count], self._kept[count:]
        self._taken += count
        return np.concatenate((taken, np.zeros(count - len(taken), np.int16)))


def _is_quiet(samples: Samples) -> bool:
    return float(np.square(samples, dtype=np.float64).sum()) < QUIET_RMS**2 * len(samples)


def mixed(voices: Iterable[Voice], until: int, count: int) -> Samples:
    """What several voices are together, of as many samples."""
    total = np.zeros(count, np.int32)
    for voice in voices:
        taken = voice.take(until)
        total[count - len(taken) :] += taken  # a voice that came in later has less to give
    return np.clip(total, -32768, 32767).astype(np.int16)


def mono(audio: bytes, channels: int) -> Samples:
    """One channel of 16-bit samples, whatever there were."""
    samples = np.frombuffer(audio[: len(audio) // (2 * channels) * 2 * channels], np.int16)
    return samples if channels == 1 else samples.reshape(-1, channels).mean(axis=1).astype(np.int16)


def interleaved(left: Samples, right: Samples) -> bytes:
    """Two channels as one stream of bytes."""
    return np.stack((left, right), axis=1).tobytes()
