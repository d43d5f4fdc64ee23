"""How a build tells where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One sign of life. The steps come in the order of ``STEPS``; ``done`` never shrinks within a step."""

    step: str
    """One of ``STEPS``."""
    done: int
    """How much of the step is done; 0 to ``total``."""
    total: int
    """What makes the step complete, in the step's own unit (bytes for ``download``, items otherwise)."""
    text: str
    """What is being done, for people; empty when the step says it all."""


STEPS = ("resolve", "download", "python", "kernel", "initrd", "write")
"""``resolve`` asks apt, ``download`` fetches packages, ``python`` picks and compiles the interpreter's
modules, ``kernel`` unpacks kernel and modules, ``initrd`` packs the archive, ``write`` puts the image in
place. A build that finds the image current does ``resolve`` only."""

Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Report to nobody."""
