"""What the documentation shows, so that tests can try it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_BLOCK = re.compile(r"^```(?:yaml|json)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def documents(page: Path) -> list[dict[str, Any]]:
    """The YAML and JSON documents of a page, in their order; YAML reads both."""
    return [document for block in _BLOCK.findall(page.read_text()) for document in yaml.safe_load_all(block)]
