"""Packages whose parts are imported when they are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from voicepool_agent import lazy_packages


@pytest.fixture
def package(tmp_path: Path) -> Iterator[str]:
    """A package that re-exports two modules, lazy for one test."""
    folder = tmp_path / "a_lazy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from __future__ import annotations\n"
        "from .one import One as One, other as renamed\n"
        "from .two import Two\n"
        "VALUE = 7\n"
    )
    (folder / "one.py").write_text("class One: ...\nother = 1\n")
    (folder / "two.py").write_text("from .one import One\nclass Two(One): ...\n")
    path, finders = sys.path[:], sys.meta_path[:]
    sys.path.insert(0, str(tmp_path))
    lazy_packages.install("a_lazy_package")
    yield "a_lazy_package"
    sys.path[:], sys.meta_path[:] = path, finders
    for name in [name for name in sys.modules if name.startswith("a_lazy_package")]:
        del sys.modules[name]


def test_a_module_is_imported_when_its_name_is_asked_for(package: str) -> None:
    module = __import__(package)
    assert module.VALUE == 7
    assert f"{package}.one" not in sys.modules
    assert module.renamed == 1
    assert f"{package}.one" in sys.modules
    assert f"{package}.two" not in sys.modules


def test_names_are_the_same_objects_whichever_way_they_are_reached(package: str) -> None:
    from a_lazy_package import One, Two, one  # type: ignore[import-not-found]

    assert issubclass(Two, One)
    assert one.One is One
    assert set(dir(sys.modules[package])) >= {"One", "Two", "renamed", "VALUE", "one", "two"}


def test_a_name_that_is_not_there_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match="'a_lazy_package' has no attribute 'nothing'"):
        _ = __import__(package).nothing


def names_of_openai(*, lazy: bool) -> dict[str, list[str]]:
    """All public names of openai.types and two packages below it, each reached, as another process sees them."""
    program = textwrap.dedent(
        f"""
        import importlib, json, sys
        if {lazy}:
            from voicepool_agent import lazy_packages
            lazy_packages.install()
        import openai
        before = len([name for name in sys.modules if name.startswith("openai.types")])
        found = {{"modules": [str(before)]}}
        for name in ("openai.types", "openai.types.chat", "openai.types.responses"):
            module = importlib.import_module(name)
            kinds = {{one: type(getattr(module, one)).__name__ for one in dir(module) if one[0] != "_"}}
            found[name] = sorted(f"{{one}} {{kind}}" for one, kind in kinds.items())
        print(json.dumps(found))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_openai_keeps_every_name_and_imports_a_fraction() -> None:
    eager, lazy = names_of_openai(lazy=False), names_of_openai(lazy=True)
    eager_modules, lazy_modules = int(eager.pop("modules")[0]), int(lazy.pop("modules")[0])
    assert lazy_modules < eager_modules / 4
    for package, names in eager.items():
        missing = set(names) - set(lazy[package]) - {"annotations _Feature"}
        # submodules that another module happened to import appear in the package only once that has happened
        assert {name for name in missing if not name.endswith(" module")} == set()
