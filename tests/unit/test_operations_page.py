"""The page for operators names all that they can set, and all that they can measure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from voicepool.gateway.metrics import GatewayMetrics
from voicepool.metrics import OperatorMetrics
from voicepool.settings import PREFIX, GatewaySettings, OperatorSettings, Settings
from voicepool_agent.metrics import Metrics as AgentMetrics

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


@pytest.mark.parametrize("model", [OperatorSettings, GatewaySettings])
def test_every_setting_is_on_the_page(model: type[Settings]) -> None:
    assert [name for name in model.model_fields if f"`{PREFIX}{name.upper()}`" not in PAGE] == []


@pytest.mark.parametrize(
    "exposition",
    [
        generate_latest(OperatorMetrics(CollectorRegistry()).registry),
        generate_latest(GatewayMetrics().registry),
        AgentMetrics(["parked"]).render(),
    ],
    ids=["operator", "gateway", "agent"],
)
def test_every_metric_is_on_the_page(exposition: bytes) -> None:
    names = re.findall(r"^# TYPE (\w+)", exposition.decode(), re.MULTILINE)
    metrics = [name for name in names if not name.endswith("_created")]
    assert len(metrics) > 5
    assert [name for name in metrics if f"`{name}`" not in PAGE] == []
