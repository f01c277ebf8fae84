"""A bot of somebody's own becomes an image as the guide says: built on the agent image of this repository, with a bot of examples/."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.images import IMAGES, Builder, build_all, choose_builder
from tests.cluster.progress import Progress

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "bring-your-bot.md"
OWN = "localhost/voicepool-own-bot:test"


@pytest.fixture(scope="module")
def builder() -> Builder:
    """What builds, once the agent image is there."""
    progress = Progress()
    build_all(progress, ["agent"])
    return choose_builder(progress)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A folder with the guide's Dockerfile of three lines, on the image that was built here, and a bot."""
    (dockerfile, *_) = re.findall(r"^```dockerfile\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    lines = dockerfile.splitlines()
    assert len(lines) == 3
    lines[0] = f"FROM {IMAGES['agent'].name}"
    (tmp_path / "Dockerfile").write_text("\n".join(lines) + "\n")
    shutil.copy(ROOT / "examples" / "own_routes.py", tmp_path / "bot.py")
    shutil.copy(ROOT / "examples" / "services.py", tmp_path)
    return tmp_path


@pytest.fixture
def built(builder: Builder, context: Path) -> Iterator[str]:
    builder.build(OWN, context / "Dockerfile", context, inputs="a-test")
    yield OWN
    builder.remove(OWN)


def test_three_lines_make_an_image_of_a_bot(builder: Builder, built: str) -> None:
    assert builder.read(built, "/app/bot.py") == (ROOT / "examples" / "own_routes.py").read_text()


def test_what_is_no_bot_makes_no_image(builder: Builder, context: Path) -> None:
    (context / "bot.py").write_text("def bot(runner_args): ...\n")
    with pytest.raises(ClusterError, match="must have `async def bot") as raised:
        builder.build(OWN, context / "Dockerfile", context, inputs="a-test")
    assert "Traceback" not in str(raised.value)
    assert not builder.inputs_of(OWN)
