"""The CustomResourceDefinition is what the models say, and has the form that Kubernetes takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voicepool.crd import FILE_NAME, custom_resource_definition, to_yaml
from voicepool.model import VoiceAgentPoolSpec

CRDS = Path(__file__).parents[2] / "crds"


def version() -> dict[str, Any]:
    (only,) = custom_resource_definition()["spec"]["versions"]
    return dict(only)


def schema() -> dict[str, Any]:
    return dict(version()["schema"]["openAPIV3Schema"])


def every_schema(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("properties", {}).values():
        yield from every_schema(child)
    if "items" in node:
        yield from every_schema(node["items"])


def test_the_file_is_what_the_models_say() -> None:
    assert (CRDS / FILE_NAME).read_text() == to_yaml(), "run `make crds`"


def test_every_field_of_the_spec_is_described() -> None:
    def undescribed(node: dict[str, Any], path: str) -> Iterator[str]:
        for name, child in node.get("properties", {}).items():
            if name == "template":
                continue
            if not child.get("description"):
                yield f"{path}.{name}"
            yield from undescribed(child, f"{path}.{name}")

    assert list(undescribed(schema()["properties"]["spec"], "spec")) == []


def test_every_description_of_seconds_says_so() -> None:
    for node in every_schema(schema()["properties"]["spec"]):
        for name, child in node.get("properties", {}).items():
            if name.endswith("Seconds"):
                assert "seconds" in child["description"], name


def test_the_form_is_structural() -> None:
    for node in every_schema(schema()):
        assert ("type" in node) != (node.get("x-kubernetes-int-or-string") is True)
        assert not {"$ref", "$defs", "anyOf", "title", "examples"} & set(node)
        assert not ("properties" in node and "additionalProperties" in node)


def test_defaults_in_the_schema_are_those_of_the_models() -> None:
    properties = schema()["properties"]["spec"]["properties"]
    model = VoiceAgentPoolSpec(template={}).model_dump(by_alias=True, exclude_none=True)
    assert {name: child["default"] for name, child in properties.items() if "default" in child} == {
        name: value for name, value in model.items() if name != "template"
    }


def test_replicas_have_a_default_since_the_scale_subresource_fails_without() -> None:
    assert schema()["properties"]["spec"]["properties"]["replicas"]["default"] == 1
    assert version()["subresources"]["scale"]["labelSelectorPath"] == ".status.selector"


def test_a_pool_that_nobody_has_looked_at_is_not_taken_for_a_finished_one() -> None:
    assert schema()["properties"]["status"]["default"] == {"observedGeneration": -1}


def test_a_number_or_a_percentage_keeps_the_rules_of_both() -> None:
    strategy = schema()["properties"]["spec"]["properties"]["updateStrategy"]["properties"]
    surge = strategy["rollingUpdate"]["properties"]["maxSurge"]
    assert surge["default"] == "25%"
    assert (surge["minimum"], surge["pattern"]) == (0, "^(100|[1-9]?[0-9])%$")
    (rule,) = strategy["rollingUpdate"]["x-kubernetes-validations"]
    assert "must not both be 0" in rule["message"]


def test_headroom_is_off_until_somebody_asks_for_it() -> None:
    headroom = schema()["properties"]["spec"]["properties"]["headroom"]
    assert "default" not in headroom
    assert headroom["properties"]["schedules"]["items"]["required"] == ["cron", "warmPods"]


def test_an_optional_field_is_absent_rather_than_null() -> None:
    url = schema()["properties"]["spec"]["properties"]["livekit"]["properties"]["url"]
    assert url["type"] == "string"
    assert "default" not in url
