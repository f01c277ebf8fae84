"""The chart's files, read as they are: what can be said of them without Helm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from voicepool import crd

CHART = Path(__file__).parents[2] / "helm" / "voicepool"


def _unknown(values: dict[str, Any], schema: dict[str, Any], place: str = "") -> list[str]:
    """Values of the file that the schema does not have, or would let pass misspelt."""
    if not values:
        return []
    properties = schema.get("properties", {})
    found = [] if schema.get("additionalProperties") is False else [f"{place or '/'} lets misspelt names pass"]
    for name, value in values.items():
        if name not in properties:
            found.append(f"{place}/{name} is not in the schema")
        elif isinstance(value, dict) and "properties" in properties[name]:
            found += _unknown(value, properties[name], f"{place}/{name}")
    return found


def test_the_custom_resource_definition_is_the_generated_one() -> None:
    assert (CHART / "files" / crd.FILE_NAME).read_text() == crd.to_yaml(), "run: cp crds/*.yaml helm/voicepool/files/"


def test_the_schema_knows_every_value_and_lets_no_misspelt_one_pass() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert _unknown(values, schema) == []
    assert schema["properties"].keys() - {"global"} == values.keys()


def test_the_version_of_the_chart_is_the_version_of_voicepool() -> None:
    from voicepool import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
