"""The command behind ``dev/bench``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.boot import guest_boot
from bench.commands import commands
from bench.execs import execute
from bench.options import Options
from bench.report import Result
from bench.starts import cold_start, pod_start

BENCHES: dict[str, Callable[[Options], Awaitable[Result]]] = {
    "pod-start": pod_start,
    "cold-start": cold_start,
    "guest-boot": guest_boot,
    "exec": execute,
    "commands": commands,
}


def main() -> int:
    """Run the benchmarks that are named, or all; 0 when every ratio keeps its bound."""
    parser = argparse.ArgumentParser(prog="dev/bench", description="Each prints a ratio against its floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; none: all")
    parser.add_argument("--quick", action="store_true", help="few samples: to try it out")
    parser.add_argument("--guest-dir", type=Path, default=Options().guest_dir, help="the guest image")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    options = Options(quick=given.quick, guest_dir=given.guest_dir)
    results = []
    for name in given.names or BENCHES:
        results.append(asyncio.run(BENCHES[name](options)))
        results[-1].print()
    return 0 if all(result.reached for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
