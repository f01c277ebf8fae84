"""Which numbers the pods of a pool have had: a number is given once, so that a pod's name never means another pod.

Not everybody names the very pod that is meant: Kubernetes' own pod garbage collector deletes what has ended, and what was never scheduled, by its name
alone, from a list that may be some time old (`pkg/controller/podgc`, 1.37), and so does ``kubectl delete pod``. A successor of the same name, bound by
then, would lose its call.

Invariants: what was seen stays used, whether or not the pod is still there; with the same pods seen the same numbers are free, so that two writers who
know the same choose the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from voicepool.podspec import number_of


@dataclass(frozen=True, slots=True)
class UsedNumbers:
    """The numbers that pods of one pool have, or once had."""

    below: int = 0
    """All numbers below this one are used."""
    others: frozenset[int] = frozenset()
    """Used ones above it."""

    @classmethod
    def up_to(cls, names: Iterable[str]) -> UsedNumbers:
        """For who sees the pool for the first time: what is missing among its numbers is gone, and had been there."""
        return cls(max((number + 1 for number in _numbers(names)), default=0))

    def and_of(self, names: Iterable[str]) -> UsedNumbers:
        """With those of these pods."""
        others = {number for number in _numbers(names) if number >= self.below} | self.others
        below = self.below
        while below in others:
            others.discard(below)
            below += 1
        return UsedNumbers(below, frozenset(others))

    def __contains__(self, number: int) -> bool:
        return number < self.below or number in self.others


NONE_USED = UsedNumbers()


def _numbers(names: Iterable[str]) -> Iterable[int]:
    return (number for number in map(number_of, names) if number is not None)
