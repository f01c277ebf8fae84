"""Bills of materials of the images, as the build writes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

SBOM = Path(__file__).parents[2] / "agent-image" / "sbom"

STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.41-12+deb13u1
Description: GNU C Library
 shared libraries

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1.0
"""


def distribution(folder: Path, name: str, version: str, *fields: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *fields])
    )


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    distribution(tmp_path, "Some.Package", "1.0+local", "License-Expression: MIT OR Apache-2.0")
    distribution(tmp_path, "older", "2.0", "License: BSD")
    distribution(tmp_path, "oldest", "3.0", "Classifier: License :: OSI Approved :: MIT License")
    distribution(tmp_path, "wordy", "4.0", f"License: {'word ' * 50}")
    distribution(tmp_path, "silent", "5.0")
    return tmp_path


def test_python_packages_are_named_as_the_index_names_them_with_their_licences(packages: Path) -> None:
    found: dict[str, Any] = {one["name"]: one for one in run_path(str(SBOM))["python_packages"]([str(packages)])}
    assert found["some-package"]["purl"] == "pkg:pypi/some-package@1.0%2Blocal"
    assert {name: one.get("licenses") for name, one in found.items()} == {
        "some-package": [{"expression": "MIT OR Apache-2.0"}],
        "older": [{"license": {"name": "BSD"}}],
        "oldest": [{"license": {"name": "MIT License"}}],
        "wordy": None,
        "silent": None,
    }


def test_debian_packages_are_those_that_are_installed() -> None:
    (found,) = run_path(str(SBOM))["debian_packages"](STATUS)
    assert (found["name"], found["version"]) == ("libc6", "2.41-12+deb13u1")
    assert found["purl"] == "pkg:deb/debian/libc6@2.41-12%2Bdeb13u1?arch=amd64"


@pytest.mark.skipif(not Path("/var/lib/dpkg/status").exists(), reason="this system has no dpkg, as the images have")
def test_the_bill_names_the_image_and_is_the_same_each_time(packages: Path) -> None:
    command = [sys.executable, str(SBOM), "an-image", str(packages)]
    first, second = (subprocess.run(command, check=True, capture_output=True).stdout for _ in range(2))
    assert first == second
    bill = json.loads(first)
    assert (bill["bomFormat"], bill["specVersion"], bill["metadata"]["component"]["name"]) == (
        "CycloneDX",
        "1.6",
        "an-image",
    )
    references = [component["bom-ref"] for component in bill["components"]]
    assert references == sorted(set(references))
    assert "pkg:pypi/older@2.0" in references
