"""Label selectors over pools: a map of labels and values, or the string that ``kubectl -l`` takes. Pure.

``language=fr,tier!=free``, ``language in (fr, de)``, ``tier notin (free)``, ``gpu`` (the label is there), ``!legacy`` (it is not). As in Kubernetes, ``!=`` and
``notin`` also match where the label is absent, all requirements have to hold, and an empty selector matches everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Selector = str | dict[str, str]
"""As somebody writes it."""

_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_REQUIREMENT = re.compile(
    r"\s*(?P<absent>!)?\s*(?P<name>[\w./-]+)\s*"
    r"(?:(?P<equality>==?|!=)\s*(?P<value>[\w.-]*)\s*|(?P<set>in|notin)\s*\((?P<values>[^()]*)\)\s*)?(?P<end>,|$)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What one label has to be."""

    name: str
    values: frozenset[str] | None
    """One of these; None: any value."""
    holds: bool = True
    """Whether it has to be so, or must not."""

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether some labels are as required."""
        there = labels.get(self.name)
        found = there is not None and (self.values is None or there in self.values)
        return found is self.holds


def matches(selector: tuple[Requirement, ...], labels: Mapping[str, str]) -> bool:
    """Whether all requirements hold."""
    return all(requirement.matches(labels) for requirement in selector)


def parse(selector: Selector) -> tuple[Requirement, ...]:
    """Read a selector.

    Raises:
        ValueError: it is none; the message quotes the part that cannot be read.
    """
    if not isinstance(selector, str):
        return tuple(Requirement(_name(name), frozenset({_value(value)})) for name, value in selector.items())
    requirements: list[Requirement] = []
    position = 0
    more = bool(selector.strip())
    while more:
        found = _REQUIREMENT.match(selector, position)
        if found is None or (found["absent"] and (found["equality"] or found["set"])):
            raise ValueError(
                f"{selector[position : position + 64]!r} is not a requirement such as 'language=fr' or 'language in (fr, de)'"
            )
        requirements.append(_requirement(found))
        position = found.end()
        more = found["end"] == ","
    return tuple(requirements)


def _requirement(found: re.Match[str]) -> Requirement:
    name = _name(found["name"])
    if found["equality"]:
        return Requirement(name, frozenset({_value(found["value"])}), holds=found["equality"] != "!=")
    if found["set"]:
        values = frozenset(_value(value.strip()) for value in found["values"].split(","))
        return Requirement(name, values, holds=found["set"] == "in")
    return Requirement(name, None, holds=not found["absent"])


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text[:64]!r} is not the name of a label")
    return text


def _value(text: str) -> str:
    if not _VALUE.fullmatch(text):
        raise ValueError(f"{text[:64]!r} is not the value of a label")
    return text
