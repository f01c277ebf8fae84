"""What the check of an image's build says of a bot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import voicepool_agent

SOURCES = Path(voicepool_agent.__file__).parents[1]
A_BOT = """
from pipecat.runner.utils import create_transport
from pipecat.transports.daily.transport import DailyParams
from pipecatcloud_system import app

def readyz():
    return True

@app.get("/status")
async def status(): ...

async def bot(runner_args): ...
"""


def check(folder: Path, source: str | None) -> tuple[int, str]:
    if source is not None:
        (folder / "bot.py").write_text(source)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES), "LOGURU_AUTOINIT": "False"}
    command = [sys.executable, "-m", "voicepool_agent.check"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_bot_for_pipecat_cloud_is_a_bot(tmp_path: Path) -> None:
    assert check(tmp_path, A_BOT) == (0, "bot.py is a bot, with readyz()\n")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "there is no bot at bot.py"),
        ("import no_such_module", "needs the module no_such_module, which is not in the image"),
        ("def bot(runner_args): ...", "must have `async def bot(runner_args)`"),
    ],
)
def test_what_is_no_bot_fails_the_build_with_one_line(source: str | None, words: str, tmp_path: Path) -> None:
    code, said = check(tmp_path, source)
    assert (code, said.count("\n")) == (1, 1)
    assert words in said
