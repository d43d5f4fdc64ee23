"""What the command line of the benchmarks says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Args:
        quick: Few samples: for trying it out, not for figures to quote.
        guest_dir: The guest image.
    """

    quick: bool = False
    guest_dir: Path = Path("/var/lib/vcnode/guest")
