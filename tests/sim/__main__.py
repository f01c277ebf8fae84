"""``python -m tests.sim``: play many seeds, or one with its story."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time

from .mutants import MUTANTS
from .stories import play


def main() -> int:
    """Play; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, metavar="N", help="play N seeds (default 200)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them (default 0)")
    parser.add_argument("--seed", type=int, help="play this one and print its story")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with this bug built in")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with MUTANTS[options.mutant or "none"]():
        return _one(options.seed) if options.seed is not None else _many(options.first, options.seeds)


def _one(seed: int) -> int:
    world = play(seed)
    print("\n".join(world.story))
    print(f"\nseed {seed}: {'; '.join(world.problems) or 'all well'}")
    return bool(world.problems)


def _many(first: int, count: int) -> int:
    began = time.monotonic()
    played = failed = 0
    binds = creates = deletes = overshoot = leaks = 0
    # Whoever interrupts it is told how far it came.
    with contextlib.suppress(KeyboardInterrupt):
        for seed in range(first, first + count):
            world = play(seed)
            played += 1
            binds += world.invariants.binds
            creates += world.invariants.creates
            deletes += world.invariants.deletes
            leaks += world.leaks
            overshoot = max(overshoot, world.invariants.overshoot)
            if world.problems:
                failed += 1
                print(f"seed {seed}: {world.problems[0]}\n    its story: python -m tests.sim --seed {seed}", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{played} seeds in {seconds:.0f} s, {failed} failed; {creates} creates, {binds} binds, {deletes} deletes; "
        f"at most {max(0, overshoot)} pods over maxPods, {leaks} bound pods without a session at the end"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
