"""The CustomResourceDefinition, generated from the pydantic models: a structural schema with defaults, limits and rules in words.

There is no admission webhook, so whatever can be refused is refused here. What only the API server can judge (the pod template) is checked by a
dry run and reported in a condition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from voicepool.model import AGENT_CONTAINER, GROUP, KIND, PLURAL, VERSION, VoiceAgentPoolSpec

Schema = dict[str, Any]

MAX_POOL_NAME_CHARACTERS = 40
"""Pool name, template hash and number make a pod's name, and the pool's name is a label value (63 characters)."""

FILE_NAME = f"{PLURAL}.{GROUP}.yaml"

_KEPT = {
    "type",
    "description",
    "default",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "maxItems",
    "x-kubernetes-int-or-string",
}

HEADER = "# Generated from the models in operator/src/voicepool/model.py by `make crds`; do not edit.\n"


def custom_resource_definition() -> Schema:
    """The whole object, as JSON."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["vpool"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root_schema()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": _printer_columns(),
                }
            ],
        },
    }


def to_yaml() -> str:
    """The file in ``crds/``."""
    # Only this command writes YAML; both processes do without.
    import yaml

    text: str = yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=120, allow_unicode=True)
    return HEADER + text


def _root_schema() -> Schema:
    spec = structural(VoiceAgentPoolSpec.model_json_schema(by_alias=True))
    spec["properties"]["updateStrategy"]["properties"]["rollingUpdate"]["x-kubernetes-validations"] = [
        {
            "rule": f"!({_is_zero('maxSurge')} && {_is_zero('maxUnavailable')})",
            "message": "maxSurge and maxUnavailable must not both be 0: no pod could be replaced",
        }
    ]
    spec["properties"]["template"] = _template_schema(spec["properties"]["template"]["description"])
    return {
        "type": "object",
        "description": "A pool of voice agents that are kept warm: started, ready, and waiting for a caller.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _status_schema(),
        },
        "x-kubernetes-validations": [
            {
                "rule": f"size(self.metadata.name) <= {MAX_POOL_NAME_CHARACTERS}",
                "message": f"the name of a pool has at most {MAX_POOL_NAME_CHARACTERS} characters, "
                "since it is part of its pods' names",
            }
        ],
    }


def _is_zero(field: str) -> str:
    """A CEL expression about a field that is a number or a percentage."""
    return f"(type(self.{field}) == int ? self.{field} == 0 : self.{field} == '0%')"


def structural(schema: Mapping[str, Any]) -> Schema:
    """Rewrite a JSON schema of pydantic into the structural form that Kubernetes takes.

    References are put in place, an optional field loses its null, defaults of nested models are spelt out, and what Kubernetes
    does not know (``title``, ``additionalProperties: false``) is left out.
    """
    return _structural(schema, schema.get("$defs", {}))


def _structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    source = dict(schema)
    if "anyOf" in source:
        options = [option for option in source.pop("anyOf") if option.get("type") != "null"]
        if {option.get("type") for option in options} == {"integer", "string"}:
            # Numbers have a minimum, strings a pattern: each rule applies to its own kind only.
            merged = {name: value for option in options for name, value in option.items() if name != "type"}
            options = [{**merged, "x-kubernetes-int-or-string": True}]
        (only,) = options
        source = {**only, **source}
        if source.get("default", ...) is None:
            del source["default"]
    if "$ref" in source:
        source = {**definitions[source.pop("$ref").rsplit("/", 1)[-1]], **source}
    result = {name: value for name, value in source.items() if name in _KEPT}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if result.get("type") == "integer":
        result["format"] = "int32"
    if "items" in source:
        result["items"] = _structural(source["items"], definitions)
    if "properties" in source:
        result["properties"] = {name: _structural(value, definitions) for name, value in source["properties"].items()}
        if source.get("required"):
            result["required"] = source["required"]
        if "default" in result:
            # The API server fills in a nested default only where the object itself is there.
            result["default"] = {
                # A copy, or YAML would write a reference to it.
                name: copy.deepcopy(value["default"])
                for name, value in result["properties"].items()
                if "default" in value
            }
    return result


def _template_schema(description: str) -> Schema:
    """Open for every field that a pod may have, declared as far as the rules below and :mod:`voicepool.podspec` need it."""
    an_object: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    objects: Schema = {"type": "array", "items": an_object}

    def text_map() -> Schema:
        return {
            "type": "object",
            "additionalProperties": {"type": "string", "maxLength": 4096},
            "maxProperties": 128,
        }

    return {
        "type": "object",
        "description": description,
        "required": ["spec"],
        "x-kubernetes-preserve-unknown-fields": True,
        "properties": {
            "metadata": {
                "type": "object",
                "description": "Labels and annotations that every pod of the pool gets.",
                "properties": {"labels": text_map(), "annotations": text_map()},
            },
            "spec": {
                "type": "object",
                "description": "As in a Pod. restartPolicy is always Never: a pod lives for at most one session.",
                "x-kubernetes-preserve-unknown-fields": True,
                "properties": {
                    "restartPolicy": {"type": "string", "maxLength": 32},
                    "terminationGracePeriodSeconds": {
                        "type": "integer",
                        "format": "int64",
                        "minimum": 0,
                        "description": "How many seconds a bound agent has to end its call when its pod is deleted.",
                    },
                    "securityContext": an_object,
                    "volumes": objects,
                    "containers": {
                        "type": "array",
                        "description": "One of them is named agent.",
                        "maxItems": 32,
                        "items": {
                            "type": "object",
                            "x-kubernetes-preserve-unknown-fields": True,
                            "required": ["name"],
                            "properties": {
                                "name": {"type": "string", "maxLength": 63},
                                "image": {"type": "string", "maxLength": 1024},
                                **dict.fromkeys(("ports", "env", "volumeMounts"), objects),
                                **dict.fromkeys(("lifecycle", "securityContext"), an_object),
                            },
                        },
                    },
                },
            },
        },
        "x-kubernetes-validations": [
            {
                "rule": "has(self.spec.containers) && "
                f"self.spec.containers.exists(container, container.name == '{AGENT_CONTAINER}')",
                "message": f"spec.template.spec.containers must have a container named '{AGENT_CONTAINER}', "
                "which runs the agent image",
            },
            {
                "rule": "!has(self.spec.restartPolicy) || self.spec.restartPolicy == 'Never'",
                "message": "spec.template.spec.restartPolicy must be Never or left out: "
                "an agent that ends is replaced by a new pod",
            },
            {
                "rule": "!has(self.metadata) || !has(self.metadata.labels) || "
                f"self.metadata.labels.all(label, !label.startsWith('{GROUP}/'))",
                "message": f"spec.template.metadata.labels must not begin with {GROUP}/, voicepool sets those itself",
            },
        ],
    }


def _status_schema() -> Schema:
    def count(description: str) -> Schema:
        return {"type": "integer", "format": "int32", "description": description}

    return {
        "type": "object",
        "description": "What voicepool last saw and did. Written by the operator only.",
        # Tools that wait for a pool would otherwise take one that nobody has looked at yet for a finished one.
        "default": {"observedGeneration": -1},
        "properties": {
            "observedGeneration": {
                "type": "integer",
                "format": "int64",
                "description": "The generation of the spec that this status is about; -1 before the first look.",
            },
            "replicas": count("Number of unbound pods, warm or starting."),
            "readyReplicas": count("Number of warm pods: unbound and Ready."),
            "startingReplicas": count("Number of unbound pods that are not Ready yet."),
            "boundReplicas": count("Number of bound pods: each carries one session."),
            "endedReplicas": count("Number of ended pods that are kept for their logs and summary."),
            "updatedReplicas": count("Number of unbound pods of the current template."),
            "recommendedReplicas": count("How many pods spec.headroom recommends to keep warm."),
            "failedReplicas": count("Number of unbound pods that ended, or were not Ready in time."),
            "failedStarts": count(
                "How many starts of the current template failed in a row; the wait before the next grows with it."
            ),
            "sessions": {
                "type": "object",
                "description": "Sessions since the pool was made, as the operators at work saw them; metrics tell the reasons.",
                "properties": {
                    "started": count("Pods that were bound."),
                    "hits": count(
                        "Of them, those whose caller found a warm agent: bound within a second, not for a cold start."
                    ),
                    "hitPercent": count("Hits of 100 sessions."),
                    "waitedMillisecondsP50": count(
                        "How long half of the callers waited for the bind at most; of those whose pods were there at the last change."
                    ),
                    "waitedMillisecondsP99": count("How long 99 of 100 callers waited at most."),
                    "startupSecondsP95": count("How long 95 of 100 pods took from create to Ready at most."),
                    "ended": count("Sessions that ended with their agent's summary."),
                    "dropped": count("Sessions whose pod ended or vanished without one."),
                    "undelivered": count("Binds whose gateway died before their agent got the session."),
                },
            },
            "selector": {"type": "string", "description": "Label selector of the unbound pods."},
            "templateHash": {"type": "string", "description": "Names the current template in pod names and labels."},
            "image": {"type": "string", "description": "The image of the container agent."},
            "conditions": {
                "type": "array",
                "description": "Ready, Reconciling, Stalled, WarmTargetMet, TemplateValid, HeadroomValid, AtCapacity.",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "lastTransitionTime", "reason", "message"],
                    "properties": {
                        "type": {"type": "string"},
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "observedGeneration": {"type": "integer", "format": "int64"},
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "reason": {"type": "string"},
                        "message": {"type": "string"},
                    },
                },
            },
        },
    }


def _printer_columns() -> list[Schema]:
    def column(name: str, kind: str, path: str, **more: Any) -> Schema:
        return {"name": name, "type": kind, "jsonPath": path, **more}

    return [
        column("Desired", "integer", ".spec.replicas"),
        column("Warm", "integer", ".status.readyReplicas"),
        column("Starting", "integer", ".status.startingReplicas"),
        column("Bound", "integer", ".status.boundReplicas"),
        column("Ready", "string", ".status.conditions[?(@.type=='Ready')].status"),
        column("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", priority=1),
        column("Recommended", "integer", ".status.recommendedReplicas", priority=1),
        column("Hit", "integer", ".status.sessions.hitPercent", priority=1),
        column("Image", "string", ".status.image", priority=1),
        column("Age", "date", ".metadata.creationTimestamp"),
        # As long as a line may be, so last.
        column("Message", "string", ".status.conditions[?(@.type=='Ready')].message", priority=1),
    ]
