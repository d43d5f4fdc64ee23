"""What the command line of the benchmarks says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vcnode.drivers.hypervisor.qemu import tsc


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Args:
        quick: Few samples: for trying it out, not for figures to quote.
        guest_dir: The guest image.
        accel: The accelerator of the bare VMs, ``kvm`` or ``tcg``.
    """

    quick: bool = False
    guest_dir: Path = Path("/var/lib/vcnode/guest")
    accel: str = "tcg"

    @property
    def kernel_params(self) -> str:
        """What a guest without KVM must be told to boot at all on a busy host, as the node tells it."""
        khz = tsc.measure_khz() if self.accel == "tcg" else None
        return "" if khz is None else f"tsc_early_khz={khz} tsc=reliable"
