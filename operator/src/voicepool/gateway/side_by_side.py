"""Questions that are asked side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def side_by_side(questions: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The answers, in the order of the questions. A single question is asked right here: a task would first wait for its turn of the event loop."""
    asked = list(questions)
    return [await asked[0]] if len(asked) == 1 else await asyncio.gather(*asked)
