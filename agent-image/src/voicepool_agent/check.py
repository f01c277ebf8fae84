"""Checks a bot while its image is built: `RUN python3 -m voicepool_agent.check`.

Imports it as the agent would, and looks whether it is one. Nothing of it is run, so no key is needed, unless the bot
reads keys while it is imported.
"""

from __future__ import annotations

import os
import sys

from voicepool_agent.bots import BotError, load_bot
from voicepool_agent.main import prepare_imports


def main() -> int:
    """Say in one line how it is; 0 for a bot, 1 for something else."""
    prepare_imports()
    name = os.environ.get("BOT") or "bot.py"
    try:
        bot = load_bot(name)
    except BotError as error:
        print(error, file=sys.stderr)  # noqa: T201 - for a person
        return 1
    more = [word for word, there in (("readyz()", bot.readyz), ("goodbye()", bot.goodbye)) if there is not None]
    print(f"{name} is a bot" + (f", with {' and '.join(more)}" if more else ""))  # noqa: T201 - for a person
    return 0


if __name__ == "__main__":
    sys.exit(main())
