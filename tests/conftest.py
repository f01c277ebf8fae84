"""What tests of several kinds share: clusters, and figures to be seen.

A cluster is made once per run and only when a test asks for it; runs side by side do not collide.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.providers import choose, look
from tests.cluster.tool import Cluster, open_cluster, remove_abandoned

_PREFIX = "test-"

Show = Callable[[str], None]


def _cluster(name: str, control_plane_only: bool) -> Iterator[Cluster]:
    try:
        choose("native", look(os.environ), control_plane_only)
    except ClusterError as error:
        pytest.skip(str(error))
    remove_abandoned(_PREFIX)
    made = open_cluster(f"{_PREFIX}{os.getpid()}{name}", "native", control_plane_only)
    made.up()
    try:
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """An API server with its controllers and no node: pods are stored and not run. Needs Linux and Go."""
    yield from _cluster("-api", control_plane_only=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A whole Kubernetes that runs pods. Needs Linux, root and Go."""
    yield from _cluster("", control_plane_only=False)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Prints figures also where a test passes."""

    def printed(line: str) -> None:
        with capsys.disabled():
            print(f"\n    {line}", end="", flush=True)  # noqa: T201 - for whoever looks on

    return printed


def pytest_configure() -> None:
    """Whoever ends the tests politely leaves no cluster behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_report_header() -> str:
    """Says which tests can run, before they do."""
    root = "root" if os.geteuid() == 0 else "not root: tests that need a node are skipped"
    return f"clusters for tests: native ({sys.platform}, {root})"
