"""Statistics of measurements. Pure.

Quantiles are values that were seen (nearest rank), never something between two of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure with its spread."""

    value: float
    low: float
    high: float
    samples: int
    """How many single measurements it comes from."""


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed.

    Args:
        values: at least one.
        share: above 0, at most 1; 0.5 is the median.

    Raises:
        ValueError: there are no values, or the share is out of its range.
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"no quantile {share} of {len(values)} values")
    return sorted(values)[math.ceil(share * len(values)) - 1]


def blocks(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """The values in `count` runs of neighbours, as equal in length as can be.

    Raises:
        ValueError: there are fewer values than blocks.
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"{len(values)} values do not make {count} blocks")
    edges = [round(number * len(values) / count) for number in range(count + 1)]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


def over_rounds(values: Sequence[float]) -> Figure:
    """The median of a few rounds; the spread is the smallest and the largest round."""
    return Figure(quantile(values, 0.5), min(values), max(values), len(values))


def of_quantile(values: Sequence[float], share: float, block_count: int = 4) -> Figure:
    """A quantile of many values; the spread is that of the same quantile in blocks of neighbours."""
    return _with_blocks(lambda block: quantile(block, share), values, block_count)


def ratio_of_quantiles(values: Sequence[float], floor: Sequence[float], share: float, block_count: int = 4) -> Figure:
    """How a quantile compares with the floor's, the two having been measured in turns.

    Args:
        values: the n-th was measured beside the n-th of the floor.
        floor: as many.
        share: which quantile.
        block_count: the spread is that of the same ratio in so many blocks of neighbours.

    Raises:
        ValueError: the two are not of one length, or too short.
    """
    if len(values) != len(floor):
        raise ValueError(f"{len(values)} values beside {len(floor)} of the floor")
    parts = [
        quantile(mine, share) / quantile(theirs, share)
        for mine, theirs in zip(blocks(values, block_count), blocks(floor, block_count), strict=True)
    ]
    return Figure(quantile(values, share) / quantile(floor, share), min(parts), max(parts), len(values))


def ratio_over_rounds(values: Sequence[float], floor: Sequence[float]) -> Figure:
    """The median of the ratios, round by round."""
    return over_rounds([mine / theirs for mine, theirs in zip(values, floor, strict=True)])


def per_event(cpu_seconds: float, idle_share: float, wall_seconds: float, events: int) -> float:
    """Seconds of CPU that one event costs.

    Args:
        cpu_seconds: of the process while the events came.
        idle_share: its CPU seconds in a second in which nothing happens; they are taken off.
        wall_seconds: how long that took.
        events: how many came.
    """
    return max(0.0, cpu_seconds - idle_share * wall_seconds) / events


def delays(causes: Sequence[float], effects: Sequence[float]) -> list[float]:
    """From each cause to its effect, where the n-th effect belongs to the n-th cause; times in any order.

    Raises:
        ValueError: there are not as many effects as causes.
    """
    if len(causes) != len(effects):
        raise ValueError(f"{len(effects)} effects of {len(causes)} causes")
    return [effect - cause for cause, effect in zip(sorted(causes), sorted(effects), strict=True)]


def _with_blocks(of: Callable[[Sequence[float]], float], values: Sequence[float], block_count: int) -> Figure:
    parts = [of(block) for block in blocks(values, block_count)]
    return Figure(of(values), min(parts), max(parts), len(values))
