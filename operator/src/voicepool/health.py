"""What the operator's probes answer. Pure: facts about the process in, a :class:`Verdict` out.

Not ready means "what I know is old", not live means "starting me again would help". An API server that is away makes a process not ready for
as long as it is away; only what it has not got over by itself long after makes it not live. A stuck event loop needs no rule here: it answers no
probe at all.
"""

from __future__ import annotations

from dataclasses import dataclass

READY_SILENCES = 2.0
"""In units of the silence after which a watch is broken off: one for that, one for the first word of the next watch (a bookmark)."""
LIVE_SILENCES = 10.0
"""Longer than an ordinary absence of the API server (15 minutes, with the default)."""
READY_RESYNCS = 3.0


@dataclass(frozen=True, slots=True)
class HealthFacts:
    """What is known of the process at this moment. Ages are in seconds, infinite for never."""

    pods_listed: bool
    pods_silence_seconds: float
    pools_listed: bool
    pools_age_seconds: float
    running_seconds: float
    """Since the start."""
    pools_owed_seconds: float = 0.0
    """Since a list showed what the watch of the pools has not told yet; 0 for nothing."""
    lease_silence_seconds: float = 0.0
    """Since the API server last answered about the Lease; 0 without one."""
    lease_error: str | None = None
    holder: str = ""
    """Who works, as far as we know."""
    leading: bool = True


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """When a fact is bad."""

    watch_silence_seconds: float = 90.0
    resync_seconds: float = 60.0
    lease_silence_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer, and its reasons in words."""

    good: bool
    words: tuple[str, ...]

    def text(self) -> str:
        """The body of the answer."""
        return "\n".join(self.words) + "\n"


def readiness(facts: HealthFacts, limits: HealthLimits) -> Verdict:
    """Whether the process knows enough to work, or to begin working at once when the Lease comes to it."""
    problems: list[str] = []
    if not facts.pods_listed:
        problems.append("the pods have not been listed yet")
    elif facts.pods_silence_seconds > limits.watch_silence_seconds * READY_SILENCES:
        problems.append(f"nothing has been heard of the pods for {facts.pods_silence_seconds:.0f} s")
    oldest = max(limits.resync_seconds * READY_RESYNCS, limits.watch_silence_seconds * READY_SILENCES)
    if not facts.pools_listed:
        problems.append("the pools have not been listed yet")
    elif facts.pools_age_seconds > oldest:
        problems.append(f"the pools were listed {facts.pools_age_seconds:.0f} s ago")
    if facts.lease_silence_seconds > limits.lease_silence_seconds:
        problems.append(f"the Lease cannot be read or written: {facts.lease_error or 'it has not been read yet'}")
    if problems:
        return Verdict(False, tuple(problems))
    return Verdict(True, ("ok", _role(facts)))


def liveness(facts: HealthFacts, limits: HealthLimits) -> Verdict:
    """Whether the process should go on; False is for Kubernetes to start it again."""
    patience = limits.watch_silence_seconds * LIVE_SILENCES
    silence = min(facts.pods_silence_seconds, facts.running_seconds)
    if silence > patience:
        return Verdict(False, (f"nothing has been heard of the pods for {silence:.0f} s",))
    age = min(facts.pools_age_seconds, facts.running_seconds)
    if age > max(patience, limits.resync_seconds * LIVE_SILENCES):
        return Verdict(False, (f"the pools were not listed for {age:.0f} s",))
    # No outage, since lists are answered; and a watch that has only fallen silent has been broken off by now, and followed by another.
    if facts.pools_owed_seconds > limits.watch_silence_seconds * READY_SILENCES:
        owed = f"a list showed a pool {facts.pools_owed_seconds:.0f} s ago of which the watch has told nothing"
        return Verdict(False, (owed,))
    return Verdict(True, ("ok", _role(facts)))


def _role(facts: HealthFacts) -> str:
    if facts.leading:
        return "role: leader"
    return f"role: standby, the leader is {facts.holder}" if facts.holder else "role: standby, there is no leader"
