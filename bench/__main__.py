"""The command behind ``dev/bench``."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from bench.boot import guest_boot
from bench.commands import commands
from bench.crowd import burst, density
from bench.execs import execute
from bench.fleet import fleet
from bench.netsetup import netsetup
from bench.network import network
from bench.options import Options
from bench.plot import svg
from bench.report import Result, machine
from bench.starts import cold_start, pod_start, pool_start
from bench.stream import stream

BENCHES: dict[str, Callable[[Options], Coroutine[Any, Any, Result]]] = {
    "pod-start": pod_start,
    "pool-start": pool_start,
    "cold-start": cold_start,
    "guest-boot": guest_boot,
    "exec": execute,
    "burst": burst,
    "density": density,
    "commands": commands,
    "netsetup": netsetup,
    "network": network,
    "stream": stream,
    "fleet": fleet,
}


def main() -> int:
    """Run the benchmarks that are named, or all; 0 when every ratio keeps its bound."""
    parser = argparse.ArgumentParser(
        prog="dev/bench", description="Measures vcnode against floors in the same run, and prints ratios."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; none: all")
    parser.add_argument("--quick", action="store_true", help="few samples: to try it out")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios into an SVG file")
    parser.add_argument("--guest-dir", type=Path, default=Options().guest_dir, help="the guest image")
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg", help="how the VMs are run")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    options = Options(quick=given.quick, guest_dir=given.guest_dir.absolute(), accel=given.accel)
    # A benchmark that is told to end takes its VMs and its node along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results: list[Result] = []
    for name in given.names or BENCHES:
        results.append(asyncio.run(BENCHES[name](options)))
        results[-1].print()
        if given.plot is not None:
            given.plot.write_text(svg(results, machine()), encoding="utf-8")
    return 0 if all(result.reached for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
