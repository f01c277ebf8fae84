"""The caller's `body` before there is a caller: an empty dictionary that notices when a bot reads it too early.

A bot that is built before the bind and reads `runner_args.body` on the way would be built for nobody: every caller would
get its defaults. Invariants: it is the very dictionary that is filled at the bind; looking at it as a whole is no
reading (`body or {}` keeps it, and so works with what comes later; printing it shows nothing).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any


class EarlyBody(dict[str, Any]):
    """Empty until `arrived()`; each reading until then calls `read_early` with the stack of the reader."""

    def __init__(self, read_early: Callable[[traceback.StackSummary], None]) -> None:
        super().__init__()
        self._read_early: Callable[[traceback.StackSummary], None] | None = read_early

    def arrived(self) -> None:
        """From now on it is a dictionary like any other."""
        self._read_early = None

    def __bool__(self) -> bool:
        return self._read_early is not None or len(self) > 0

    def __getitem__(self, key: str) -> Any:
        self._reading()
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._reading()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        self._reading()
        return super().__eq__(other)

    __hash__ = None  # as of any dictionary

    def __or__(self, other: Any) -> Any:
        self._reading()
        return super().__or__(other)

    def __iter__(self) -> Any:
        self._reading()
        return super().__iter__()

    def __len__(self) -> int:
        self._reading()
        return super().__len__()

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dictionary."""
        self._reading()
        return super().get(key, default)

    def pop(self, *arguments: Any) -> Any:
        """As of any dictionary."""
        self._reading()
        return super().pop(*arguments)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As of any dictionary."""
        self._reading()
        return super().setdefault(key, default)

    def keys(self) -> Any:
        """As of any dictionary."""
        self._reading()
        return super().keys()

    def values(self) -> Any:
        """As of any dictionary."""
        self._reading()
        return super().values()

    def items(self) -> Any:
        """As of any dictionary."""
        self._reading()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """As of any dictionary."""
        self._reading()
        return super().copy()

    def _reading(self) -> None:
        if self._read_early is not None:
            self._read_early(traceback.extract_stack(sys._getframe(2)))
