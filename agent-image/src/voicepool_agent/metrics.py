"""What Prometheus can read from one agent, in a registry of its own.

A pod carries one session in its life, so what happens once is a gauge, and what happens at every turn a histogram or
a counter. Names begin with `voicepool_agent_`; no label ever holds an id of a session, a room or a caller.
"""

from __future__ import annotations

import math
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, generate_latest

PROVIDER_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0
)  # fmt: skip
LATENCY_BUCKETS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """The agent's metrics; each attribute is one."""

    def __init__(self, states: list[str]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.state: Final = Enum(
            "voicepool_agent_state", "Where the agent is in its life", states=states, registry=registry
        )
        self.startup_seconds: Final = Gauge(
            "voicepool_agent_startup_seconds",
            "Time from the start of the process to parked, by phase",
            ["phase"],
            registry=registry,
        )
        self.parked_bytes: Final = Gauge(
            "voicepool_agent_parked_bytes", "Resident memory when parked", registry=registry
        )
        self.joined_seconds: Final = Gauge(
            "voicepool_agent_joined_seconds", "Time from the bind to joined", registry=registry
        )
        self.first_audio_seconds: Final = Gauge(
            "voicepool_agent_first_audio_seconds", "Time from the bind to the agent's first audio", registry=registry
        )
        for unknown in (self.parked_bytes, self.joined_seconds, self.first_audio_seconds):
            unknown.set(math.nan)  # it has not come to that, which is not 0
        self.turns: Final = Counter(
            "voicepool_agent_turns", "Turns of the conversation that have ended", registry=registry
        )
        self.latency_seconds: Final = Histogram(
            "voicepool_agent_user_bot_latency_seconds",
            "Time from the end of the caller's speech to the beginning of the agent's",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.provider_latency_seconds: Final = Histogram(
            "voicepool_agent_provider_latency_seconds",
            "Time from a request to the first byte of its answer",
            ["processor"],
            buckets=PROVIDER_BUCKETS,
            registry=registry,
        )
        self.interruptions: Final = Counter(
            "voicepool_agent_interruptions", "Times that the caller cut the agent short", registry=registry
        )
        self.prompt_tokens: Final = Counter(
            "voicepool_agent_llm_prompt_tokens", "Tokens that a language model read", ["processor"], registry=registry
        )
        self.completion_tokens: Final = Counter(
            "voicepool_agent_llm_completion_tokens",
            "Tokens that a language model wrote",
            ["processor"],
            registry=registry,
        )
        self.spoken_characters: Final = Counter(
            "voicepool_agent_tts_characters", "Characters given to speech synthesis", ["processor"], registry=registry
        )
        self.heard_seconds: Final = Counter(
            "voicepool_agent_stt_audio_seconds", "Audio given to speech recognition", ["processor"], registry=registry
        )
        self.errors: Final = Counter(
            "voicepool_agent_errors", "Errors of the pipeline", ["processor", "category"], registry=registry
        )
        self.refused_orders: Final = Counter(
            "voicepool_agent_refused_orders", "Assignments and ends that were refused", ["code"], registry=registry
        )

    def render(self) -> bytes:
        """The text exposition of everything."""
        return generate_latest(self._registry)
