"""What the host can still give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vcnode.drivers.exhaustion import exhausted
from vcnode.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the host, in MiB."""

    total_mib: int
    """All of it."""
    available_mib: int
    """What new processes can get without swapping, as the kernel estimates it."""


def parse_meminfo(text: str) -> HostMemory:
    """Read the text of /proc/meminfo.

    Raises:
        ValueError: A line that is needed is missing.
    """
    fields = {
        name: int(rest.split()[0]) // 1024
        for name, _, rest in (line.partition(":") for line in text.splitlines())
        if rest.split()
    }
    try:
        return HostMemory(total_mib=fields["MemTotal"], available_mib=fields["MemAvailable"])
    except KeyError as exc:
        raise ValueError(f"/proc/meminfo has no {exc.args[0]}") from exc


def read_memory(path: Path = Path("/proc/meminfo")) -> HostMemory:
    """The host's memory now.

    Raises:
        UnavailableError: The kernel does not say.
        ResourceExhaustedError: No file descriptor is left to ask it.
    """
    try:
        return parse_meminfo(path.read_text())
    except (OSError, ValueError) as exc:
        short = exhausted(exc) if isinstance(exc, OSError) else None
        raise short or UnavailableError(f"{path} cannot be read; is /proc mounted?") from exc
