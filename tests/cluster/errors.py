"""The one error of the cluster tool: what failed, where to look, what to do. Shown to people without a stack trace."""

from __future__ import annotations


class ClusterError(Exception):
    """Something a person has to act on.

    Args:
        what: one sentence that says what failed.
        do: what to do about it.
        detail: the last lines of the component or program that failed; may be empty.
    """

    def __init__(self, what: str, do: str, detail: str = "") -> None:
        super().__init__(what)
        self.what, self.do, self.detail = what, do, detail.strip()

    def __str__(self) -> str:
        lines = [self.what]
        if self.detail:
            lines += ["", *("    " + line for line in self.detail.splitlines()), ""]
        return "\n".join([*lines, f"What to do: {self.do}"])
