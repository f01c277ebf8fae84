"""Results as a table for people and as JSON for programs. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.figures import Figure

HEADER = ("what", "measured", "spread", "goal", "", "beside", "n", "load")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result."""

    benchmark: str
    what: str
    figure: Figure
    unit: str
    """``x`` is a ratio to the floor."""
    goal: float | None = None
    """At most so much; None is a figure for information."""
    beside: str = ""
    """The floor's own figure and ours, in words."""
    load: float = 0.0
    """The machine's load average (one minute) when the benchmark began."""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        return None if self.goal is None else self.figure.value <= self.goal


def number(value: float) -> str:
    """Three digits that matter, and no more zeros than that needs."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table that can also be read as it is."""
    lines = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def document(rows: Sequence[Row], machine: dict[str, Any]) -> dict[str, Any]:
    """The whole result as one JSON object."""
    return {"machine": machine, "results": [{**dataclasses.asdict(row), "met": row.met} for row in rows]}


def _cells(row: Row) -> tuple[str, ...]:
    figure = row.figure
    spread = f"{number(figure.low)} to {number(figure.high)}" if figure.samples > 1 else ""
    goal = "" if row.goal is None else f"<= {number(row.goal)}"
    met = {None: "", True: "met", False: "MISSED"}[row.met]
    measured = f"{number(figure.value)} {row.unit}"
    return (row.what, measured, spread, goal, met, row.beside, str(figure.samples), f"{row.load:.1f}")
