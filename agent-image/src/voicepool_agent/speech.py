"""What people said, remembered only to be left out of lines that others write.

Libraries and providers quote: an error may hold the sentence that could not be spoken, or the one that a model was
writing. Any three words in a row that were said in this session are taken out of such a line, and so is a shorter saying
as a whole. Invariants: what was said is kept in this process's memory only, and not for ever; a line in which
nothing was quoted stays as it is.
"""

from __future__ import annotations

import re

HIDDEN = "[...]"
RUN = 3
"""So many words in a row make a quotation; fewer are common words."""

SHORTEST = 6
"""Characters of a shorter saying that is left out as a whole; below, it would be half of the language."""

MAX_QUOTATIONS = 50_000
"""About three hours of talk are remembered, and up to six."""

MAX_WAITING = 1000
"""Sayings, and characters of pieces, that wait to be taken in."""

_WORD = re.compile(r"\w+")


class Speech:
    """The words of one session. Hearing is cheap; what was heard is looked at when there is a line to compare it with."""

    def __init__(self) -> None:
        self._heard: list[str] = []
        self._stream = ""
        self._recent: set[tuple[str, ...]] = set()
        self._older: set[tuple[str, ...]] = set()

    def hear(self, text: str) -> None:
        """Somebody said this, as a whole."""
        self._heard.append(text)
        if len(self._heard) > MAX_WAITING:
            self._take_in()

    def hear_piece(self, text: str) -> None:
        """A piece of what a model is writing; pieces make words and sentences together."""
        self._stream += text
        if len(self._stream) > MAX_WAITING:
            self._take_in()

    def hide(self, text: str) -> str:
        """The text without quotations."""
        self._take_in()
        if not self._recent and not self._older:
            return text
        found = list(_WORD.finditer(text))
        words = [one[0].lower() for one in found]
        covered: set[int] = set()
        for length in range(1, RUN + 1):
            for start in range(len(words) - length + 1):
                run = tuple(words[start : start + length])
                if run in self._recent or run in self._older:
                    covered.update(range(start, start + length))
        for index in sorted(covered, reverse=True):
            end = found[index + 1].start() if index + 1 in covered else found[index].end()
            put = "" if index - 1 in covered else HIDDEN
            text = text[: found[index].start()] + put + text[end:]
        return text

    def _take_in(self) -> None:
        for saying in self._heard:
            words = [one.lower() for one in _WORD.findall(saying)]
            self._remember(words)
            if len(words) < RUN and sum(map(len, words)) >= SHORTEST:
                self._recent.add(tuple(words))
        self._heard.clear()
        found = list(_WORD.finditer(self._stream))
        self._remember([one[0].lower() for one in found])
        if len(found) > RUN:
            # Its last words may go on.
            self._stream = self._stream[found[-RUN].start() :]

    def _remember(self, words: list[str]) -> None:
        if len(self._recent) > MAX_QUOTATIONS:
            self._older, self._recent = self._recent, set()
        self._recent.update(zip(*(words[start:] for start in range(RUN)), strict=False))
