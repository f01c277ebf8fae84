"""Finds and loads the bot: a Python file or module with `async def bot(runner_args)`, and perhaps more.

That is the contract of Pipecat's own runner and of Pipecat Cloud. Optional are `readyz()`, and
`async def goodbye(worker, reason)`, the last words of a session that is to end. Invariants: whatever is wrong with a bot comes out
as one `BotError` whose message is one line that names the bot, the place and what to do.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


class BotError(Exception):
    """The bot cannot be used; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Bot:
    """A loaded bot."""

    name: str
    folder: Path | None
    run: Callable[[Any], Awaitable[None]]
    readyz: Callable[[], Any] | None
    goodbye: Callable[[Any, str], Awaitable[None]] | None = None

    async def is_ready(self) -> bool:
        """What the bot's own `readyz()` says: a bool, or a dictionary with `ready`. True where it has none."""
        if self.readyz is None:
            return True
        answer = self.readyz()
        if inspect.isawaitable(answer):
            answer = await answer
        return bool(answer.get("ready", False)) if isinstance(answer, dict) else bool(answer)

    def explain(self, error: BaseException) -> str:
        """One line about what the bot raised, with the place in the bot's own code."""
        return _explain(self.name, self.folder, error)


def bot_folder(name: str) -> Path | None:
    """The folder of a bot that is named by its file; None for a module."""
    return Path(name).resolve().parent if name.endswith(".py") or "/" in name else None


def load_bot(name: str) -> Bot:
    """Import the bot. Its folder goes to the front of the import path, so that it can import its neighbours.

    Args:
        name: path of a .py file, or a module's name.

    Raises:
        BotError: there is no such file or module, importing it fails, or it has no `async def bot(runner_args)`.
    """
    folder, module_name = bot_folder(name), name
    if folder is not None:
        if not Path(name).is_file():
            raise BotError(f"there is no bot at {name}; set BOT to the path of a .py file or to the name of a module")
        module_name = Path(name).stem
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise BotError(
                f"there is no module {name}; set BOT to the path of a .py file or to the name of a module"
            ) from None
        raise BotError(
            f"the bot {name} needs the module {error.name}, which is not in the image; add it to its requirements"
        ) from error
    except (Exception, SystemExit) as error:
        raise BotError(_explain(name, folder, error)) from error
    return Bot(name, folder, _entry(name, module), getattr(module, "readyz", None), _goodbye(name, module))


def _entry(name: str, module: ModuleType) -> Callable[[Any], Awaitable[None]]:
    entry = getattr(module, "bot", None)
    if not inspect.iscoroutinefunction(entry):
        raise BotError(f"the bot {name} must have `async def bot(runner_args)`, as for Pipecat's own runner")
    return entry


def _goodbye(name: str, module: ModuleType) -> Callable[[Any, str], Awaitable[None]] | None:
    goodbye: Callable[[Any, str], Awaitable[None]] | None = getattr(module, "goodbye", None)
    if goodbye is None:
        return None
    wrong = f"goodbye of the bot {name} must be `async def goodbye(worker, reason)`"
    if not inspect.iscoroutinefunction(goodbye):
        raise BotError(wrong)
    try:
        inspect.signature(goodbye).bind(None, "")
    except TypeError:
        raise BotError(wrong) from None
    return goodbye


def _explain(name: str, folder: Path | None, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        place, words = f" (line {error.lineno} of {Path(error.filename or name).name})", f"SyntaxError: {error.msg}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if folder is not None and Path(frame.filename).is_relative_to(folder)]
        place = f" (line {own[-1].lineno} of {Path(own[-1].filename).name})" if own else ""
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"the bot {name} failed: {' '.join(words.split())}{place}"
