"""What people said, remembered only to be left out of lines that others write.

Libraries and providers quote: an error may hold the sentence that could not be spoken, or the one that a model was
writing. Any three words in a row that were said in this session are taken out of such a line, and so is a shorter saying
as a whole. Invariants: what was said is kept in this process's memory only, its last `MAX_CHARACTERS`; a line in
which nothing was quoted stays as it is.
"""

from __future__ import annotations

import re
from collections import deque

HIDDEN = "[...]"
RUN = 3
"""So many words in a row make a quotation; fewer are common words."""

SHORTEST = 6
"""Characters of a shorter saying that is left out as a whole; below, it would be half of the language."""

MAX_CHARACTERS = 100_000
"""About two hours of talk."""

_WORD = re.compile(r"\w+")


class Speech:
    """The words of one session."""

    def __init__(self) -> None:
        self._sayings: deque[str] = deque()
        self._characters = 0
        self._stream = ""
        self._quotations: set[tuple[str, ...]] | None = set()

    def hear(self, text: str) -> None:
        """Somebody said this, as a whole."""
        self._sayings.append(text)
        self._characters += len(text)
        while self._characters > MAX_CHARACTERS:
            self._characters -= len(self._sayings.popleft())
        self._quotations = None

    def hear_piece(self, text: str) -> None:
        """A piece of what a model is writing; pieces make words and sentences together."""
        self._stream = (self._stream + text)[-MAX_CHARACTERS:]
        self._quotations = None

    def hide(self, text: str) -> str:
        """The text without quotations."""
        if self._quotations is None:
            self._quotations = self._find_quotations()
        if not self._quotations:
            return text
        found = list(_WORD.finditer(text))
        words = [one[0].lower() for one in found]
        covered: set[int] = set()
        for length in range(1, RUN + 1):
            for start in range(len(words) - length + 1):
                if tuple(words[start : start + length]) in self._quotations:
                    covered.update(range(start, start + length))
        for index in sorted(covered, reverse=True):
            end = found[index + 1].start() if index + 1 in covered else found[index].end()
            put = "" if index - 1 in covered else HIDDEN
            text = text[: found[index].start()] + put + text[end:]
        return text

    def _find_quotations(self) -> set[tuple[str, ...]]:
        quotations: set[tuple[str, ...]] = set()
        for saying in (*self._sayings, self._stream):
            words = [one.lower() for one in _WORD.findall(saying)]
            quotations.update(zip(*(words[start:] for start in range(RUN)), strict=False))
            if len(words) < RUN and sum(map(len, words)) >= SHORTEST:
                quotations.add(tuple(words))
        return quotations
