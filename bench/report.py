"""What every benchmark prints: the machine, medians and spreads, and one last line of JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Series:
    """Samples of one thing, in one unit."""

    name: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        """The sample below which a share *q* (0..1) of them lies, by nearest rank."""
        ordered = sorted(self.samples)
        rank = math.ceil(q * len(ordered) - 1e-9)  # 0.07 * 100 is a little more than 7
        return ordered[max(0, rank - 1)]

    def line(self) -> str:
        """One row for people."""
        return (
            f"  {self.name:<34} n={len(self.samples):<4} min {min(self.samples):9.2f}  "
            f"p50 {self.median:9.2f}  p99 {self.quantile(0.99):9.2f}  "
            f"max {max(self.samples):9.2f} {self.unit}"
        )


@dataclass(frozen=True)
class Curve:
    """How something grows: points of x and y."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Result:
    """Outcome of one benchmark.

    Args:
        bench: Its name.
        ratio: vcnode against the floor; what it is of is said in *of*.
        reach: The bound that the ratio should keep, and whether it is an upper one.
        series: Everything that was sampled.
        facts: Further figures for the JSON line.
        besides: Whether what else is demanded holds; *facts* have the figures.
        curves: Drawn below the bars, over the number of nodes, in milliseconds.
    """

    bench: str
    ratio: float
    of: str
    reach: float
    at_most: bool = True
    series: Sequence[Series] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    besides: bool = True
    curves: Sequence[Curve] = ()

    @property
    def reached(self) -> bool:
        """Whether the ratio keeps its bound, and what else is demanded holds."""
        kept = self.ratio <= self.reach if self.at_most else self.ratio >= self.reach
        return kept and self.besides

    def print(self) -> None:
        """Print machine, figures and the JSON line."""
        print(f"{self.bench}: {self.of}")
        print(f"  machine: {machine()}")
        for series in self.series:
            print(series.line())
        bound = f"{'<=' if self.at_most else '>='} {self.reach}"
        print(f"  ratio {self.ratio:.3f} (reach {bound}: {'reached' if self.reached else 'NOT reached'})")
        figures = {s.name: round(s.median, 3) for s in self.series}
        print(
            json.dumps(
                {
                    "bench": self.bench,
                    "ratio": round(self.ratio, 4),
                    "reach": self.reach,
                    "reached": self.reached,
                    "p50": figures,
                    **self.facts,
                }
            ),
            flush=True,
        )


def machine() -> str:
    """CPU, cores, memory, kernel and QEMU of this machine, in one line."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next(
            (ln.split(":", 1)[1].strip() for ln in info if ln.startswith("model name")), "unknown CPU"
        )
    with open("/proc/meminfo", encoding="utf-8") as info:
        mem_gib = int(info.readline().split()[1]) / 1024 / 1024
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False)
    version = qemu.stdout.splitlines()[0].removeprefix("QEMU emulator version ") if qemu.stdout else "no QEMU"
    return (
        f"{model}, {os.cpu_count()} cores, {mem_gib:.0f} GiB, Linux {platform.release()}, "
        f"QEMU {version}, Python {platform.python_version()}, load {os.getloadavg()[0]:.2f}"
    )
