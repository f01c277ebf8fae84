"""What a session used of its providers, and how fast they were, as Pipecat's services measure it.

Invariants: a processor is named by its class as Pipecat names it, without the number behind it, so that names are few
enough for labels; what no service has measured is unknown, which is not 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipecat.metrics.metrics import (
    LLMUsageMetricsData,
    MetricsData,
    STTUsageMetricsData,
    TTFBMetricsData,
    TTSUsageMetricsData,
)

from voicepool_agent.metrics import Metrics
from voicepool_agent.summary import Usage

_NUMBER = re.compile(r"#\d+$")


@dataclass(slots=True)
class Meter:
    """Adds up what services report, for the summary and for Prometheus."""

    metrics: Metrics
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    characters: int | None = None
    heard_seconds: float | None = None

    def read(self, data: Sequence[MetricsData]) -> None:
        """Take what one `MetricsFrame` holds."""
        for one in data:
            self._read(one, _NUMBER.sub("", one.processor))

    @property
    def usage(self) -> Usage:
        """The sums so far."""
        return Usage(self.prompt_tokens, self.completion_tokens, self.characters, self.heard_seconds)

    def _read(self, one: MetricsData, processor: str) -> None:
        metrics = self.metrics
        if isinstance(one, TTFBMetricsData):
            if one.value > 0:  # Pipecat sends zeros when a pipeline starts, which nobody has measured
                metrics.provider_latency_seconds.labels(processor).observe(one.value)
        elif isinstance(one, LLMUsageMetricsData):
            tokens = one.value
            self.prompt_tokens = (self.prompt_tokens or 0) + tokens.prompt_tokens
            self.completion_tokens = (self.completion_tokens or 0) + tokens.completion_tokens
            metrics.prompt_tokens.labels(processor).inc(tokens.prompt_tokens)
            metrics.completion_tokens.labels(processor).inc(tokens.completion_tokens)
        elif isinstance(one, TTSUsageMetricsData):
            self.characters = (self.characters or 0) + one.value
            metrics.spoken_characters.labels(processor).inc(one.value)
        elif isinstance(one, STTUsageMetricsData):
            self.heard_seconds = (self.heard_seconds or 0.0) + one.value.audio_seconds
            metrics.heard_seconds.labels(processor).inc(one.value.audio_seconds)
