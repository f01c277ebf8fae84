"""The chart's files, read as they are: what can be said of them without Helm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from tests.cluster.images import IMAGES
from tests.unit.facts import NOW, warm

from voicepool import __version__, crd
from voicepool.binding import bind_patch

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "voicepool"


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
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_skaffold_builds_our_images_and_sets_values_that_the_chart_has() -> None:
    skaffold = yaml.safe_load((ROOT / "skaffold.yaml").read_text())
    built = {
        (artifact["image"], artifact["docker"]["dockerfile"], artifact["docker"].get("target", ""))
        for artifact in skaffold["build"]["artifacts"]
    }
    assert built == {
        (image.name.split("/")[1].split(":")[0], image.dockerfile, image.target) for image in IMAGES.values()
    }
    [release] = skaffold["deploy"]["helm"]["releases"]
    assert ROOT / release["chartPath"] == CHART
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for name in (*release["setValueTemplates"], *release["setValues"]):
        group, _, key = name.partition(".")
        assert key in values[group], name


def test_the_admission_policy_lets_exactly_those_annotations_through_that_a_bind_writes() -> None:
    written = {
        operation["path"].removeprefix("/metadata/annotations/").replace("~1", "/")
        for operation in bind_patch(
            warm(1, agent_status_index=0),
            session_id="s1",
            room="room",
            bound_at=NOW,
            bound_by="g-1",
            active_deadline_seconds=7290,
            drain_seconds=60,
            caller="partner",
        )
        if operation["path"].startswith("/metadata/annotations/")
    }
    policy = (CHART / "templates" / "admission-policy.yaml").read_text()
    listed = re.search(r"variables\.annotations\.all\(k, k in \[(.*?)\]", policy, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"'([^']+)'", listed[1])) == written
