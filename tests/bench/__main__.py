"""``python -m tests.bench [NAME...]``: run benchmarks and print their tables, most of them on a control plane of their own."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from tests.bench import agent, bind, fill, node, operator_size, rate, replace, soak
from tests.bench.report import Row, document, table
from tests.bench.world import World, load_average, world
from tests.cluster.progress import Progress, words
from tests.cluster.tool import Cluster, open_cluster, remove_abandoned
from voicepool.main import calm_garbage_collector

PREFIX = "bench-"
BENCHMARKS: dict[str, Callable[[World], Awaitable[list[Row]]]] = {
    # The largest comes last: its pods would be in the others' way.
    module.NAME: module.measure
    for module in (bind, replace, fill, rate, operator_size)
}
BY_THEMSELVES: dict[str, Callable[[Path, Progress], Coroutine[Any, Any, list[Row]]]] = {
    module.NAME: module.measure for module in (agent, node, soak)
}
"""Those that need none, or one with a node, which they make. Measured first, while nothing else of ours runs."""
NAMES = (*BY_THEMSELVES, *BENCHMARKS)
UNLESS_TOLD = tuple(name for name in NAMES if name != soak.NAME)
"""The soak takes half an hour."""


def main(arguments: Sequence[str]) -> int:
    """Run; returns 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all but {soak.NAME})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    chosen = [name for name in NAMES if name in (options.names or UNLESS_TOLD)]
    # Whoever ends us politely leaves no cluster behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # As in the product's processes, for the floor and for what is measured here alike.
    calm_garbage_collector()
    progress = Progress()
    machine = _machine()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="voicepool-bench-") as folder:
        for name in [name for name in chosen if name in BY_THEMSELVES]:
            rows += _shown(name, uvloop.run(BY_THEMSELVES[name](Path(folder), progress)))
    if on_cluster := [name for name in chosen if name in BENCHMARKS]:
        rows += _on_a_cluster(on_cluster, progress)
    _print(
        f"\n{machine['processors']} processors, Python {machine['python']}, {words(progress.elapsed_seconds)} in all"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(document(rows, machine), indent=1) + "\n")
    return int(any(row.met is False for row in rows))


def _on_a_cluster(names: Sequence[str], progress: Progress) -> list[Row]:
    remove_abandoned(PREFIX)
    cluster = open_cluster(f"{PREFIX}{os.getpid()}", "native", control_plane_only=True, progress=progress)
    cluster.up()
    try:
        with tempfile.TemporaryDirectory(prefix="voicepool-bench-") as folder:
            return uvloop.run(_run(cluster, Path(folder), progress, names))
    finally:
        cluster.down()


async def _run(cluster: Cluster, folder: Path, progress: Progress, names: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    async with world(cluster, folder, progress) as made:
        for name in names:
            rows += _shown(name, await BENCHMARKS[name](made))
    return rows


def _shown(name: str, rows: list[Row]) -> list[Row]:
    _print(f"\n{name}\n\n{table(rows)}")
    return rows


def _machine() -> dict[str, Any]:
    return {
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_before": round(load_average(), 2),
    }


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
