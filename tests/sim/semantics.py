"""What an API server does with a label selector, a JSON patch and a merge patch. Pure; arguments are never changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from voicepool.kube.api import Json, Unprocessable

_MISSING = object()
_REQUIREMENT = re.compile(
    r"\s*(?P<absent>!)?\s*(?P<name>[\w./-]+)\s*"
    r"(?:(?P<equality>==?|!=)\s*(?P<value>[\w.-]*)|(?P<set>in|notin)\s*\((?P<values>[^)]*)\))?\s*(?:,|$)"
)


def selects(selector: str, labels: Mapping[str, str] | None) -> bool:
    """Whether a label selector (equality, sets, existence) matches.

    Raises:
        Unprocessable: it is none.
    """
    position = 0
    matches = True
    while position < len(selector):
        found = _REQUIREMENT.match(selector, position)
        if found is None:
            raise Unprocessable(f"unable to parse requirement: {selector[position:]}", status=400, reason="BadRequest")
        position = found.end()
        matches &= _matches(found, labels or {})
    return matches


def _matches(requirement: re.Match[str], labels: Mapping[str, str]) -> bool:
    there = labels.get(requirement["name"])
    if requirement["equality"]:
        return (there == requirement["value"]) != (requirement["equality"] == "!=")
    if requirement["set"]:
        values = {value.strip() for value in requirement["values"].split(",")}
        return (there in values) == (requirement["set"] == "in")
    return (there is None) == bool(requirement["absent"])


def json_patch(obj: Json, operations: Iterable[Mapping[str, Any]]) -> Json:
    """RFC 6902, all or nothing, with two liberties of a real API server: where the key is absent, a test for null passes and a replace adds.

    Raises:
        Unprocessable: an operation fails.
    """
    result = copy.deepcopy(obj)
    for operation in operations:
        _apply(result, operation)
    return result


def _apply(obj: Json, operation: Mapping[str, Any]) -> None:
    path, kind, value = operation["path"], operation["op"], operation.get("value")
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    missing = Unprocessable(f"the path {path} is missing", status=422, reason="Invalid")
    parent: Any = obj
    try:
        for part in parents:
            parent = parent[int(part) if isinstance(parent, list) else part]
        if isinstance(parent, list):
            key: Any = len(parent) if last == "-" else int(last)
            there = parent[key] if kind != "add" else _MISSING
            if key > len(parent):
                raise missing
        else:
            key, there = last, parent.get(last, _MISSING)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        raise missing from None
    if kind == "remove" and there is _MISSING:
        raise missing
    match kind:
        case "test":
            if (None if there is _MISSING else there) != value:
                raise Unprocessable(f"testing value {path} failed", status=422, reason="Invalid")
        case "add" if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(value))
        case "add" | "replace":
            parent[key] = copy.deepcopy(value)
        case "remove":
            del parent[key]
        case other:
            raise Unprocessable(f"unknown operation {other}", status=422, reason="Invalid")


def merge_patch(obj: Mapping[str, Any] | None, change: Mapping[str, Any]) -> Json:
    """RFC 7386: null takes away, objects are merged, everything else is replaced."""
    result = copy.deepcopy(dict(obj)) if isinstance(obj, Mapping) else {}
    for name, value in change.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, Mapping):
            result[name] = merge_patch(result.get(name), value)
        else:
            result[name] = copy.deepcopy(value)
    return result
