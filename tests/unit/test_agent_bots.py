"""Finding and loading a bot, and what is said when it does not work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from voicepool_agent.bots import BotError, load_bot

WriteBot = Callable[[str], str]


@pytest.fixture
def write_bot(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[WriteBot]:
    """Writes a bot's file; import path and modules are as before when the test is over."""
    path, modules = sys.path[:], set(sys.modules)

    def write(source: str) -> str:
        file = tmp_path / f"bot_{abs(hash(request.node.name))}.py"
        file.write_text(source)
        return str(file)

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


async def test_a_bot_is_loaded_from_its_file(write_bot: WriteBot) -> None:
    bot = load_bot(write_bot("async def bot(runner_args): runner_args.append(1)"))
    seen: list[int] = []
    await bot.run(seen)
    assert seen == [1]
    assert await bot.is_ready()


def test_a_bot_is_loaded_from_a_module_by_name(write_bot: WriteBot) -> None:
    file = Path(write_bot("async def bot(runner_args): ..."))
    sys.path.insert(0, str(file.parent))
    assert load_bot(file.stem).name == file.stem


def test_a_bot_can_import_its_neighbours(write_bot: WriteBot, tmp_path: Path) -> None:
    (tmp_path / "a_neighbour.py").write_text("answer = 42")
    load_bot(write_bot("import a_neighbour\nasync def bot(runner_args): return a_neighbour.answer"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("async def bot(:", r"SyntaxError.*line 1 of bot_"),
        ("import not_installed_anywhere", "needs the module not_installed_anywhere"),
        ("x = 1", "must have `async def bot"),
        ("def bot(runner_args): ...", "must have `async def bot"),
        (
            "async def bot(runner_args): ...\nasync def goodbye(): ...",
            r"goodbye of the bot .* must be `async def goodbye\(worker, reason\)`",
        ),
        (
            "async def bot(runner_args): ...\ndef goodbye(worker, reason): ...",
            r"must be `async def goodbye\(worker, reason\)`",
        ),
        ("\nraise RuntimeError('no\\nvoice')", r"RuntimeError: no voice \(line 2 of bot_"),
        ("import sys\nsys.exit('keys')", r"SystemExit: keys \(line 2"),
    ],
)
def test_what_is_wrong_with_a_bot_is_one_line(write_bot: WriteBot, source: str, words: str) -> None:
    with pytest.raises(BotError, match=words) as raised:
        load_bot(write_bot(source))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["/nowhere/bot.py", "not_a_module_at_all"])
def test_a_bot_that_is_not_there_is_named_with_what_to_do(name: str) -> None:
    with pytest.raises(BotError, match=f"{name}; set BOT"):
        load_bot(name)


@pytest.mark.parametrize(
    ("source", "ready"),
    [
        ("def readyz(): return True", True),
        ("def readyz(): return False", False),
        ("async def readyz(): return {'ready': True, 'models': 2}", True),
        ("def readyz(): return {'ready': False}", False),
        ("def readyz(): return {}", False),
    ],
)
async def test_the_bots_own_readyz_has_a_say(write_bot: WriteBot, source: str, ready: bool) -> None:
    bot = load_bot(write_bot(f"async def bot(runner_args): ...\n{source}"))
    assert await bot.is_ready() is ready
