"""What drivers hold on the host, so that the node can account for it.

Whatever a driver makes for a VM carries the VM's id in its name, and that id begins with the node's mark
(`vcnode.pods.marks`): what lacks the mark belongs to somebody else and is neither listed nor touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Held:
    """One thing on the host."""

    kind: str
    """``process``, ``cgroup``, ``directory``, ``mount``, ``socket``, ``template``, ``link``, …"""
    name: str
    """What an operator finds it by: a pid, a path, the name of an interface."""
    vm_id: str | None
    """The VM that it is for; None when it belongs to the node as a whole."""
    unclaimed: bool = False
    """For what is no VM's: whether whoever listed it knows that nobody has it any more."""


@runtime_checkable
class Auditable(Protocol):
    """A driver that makes things on the host. Those that make nothing need not be one."""

    async def held(self, mark: str) -> Sequence[Held]:
        """All that the host holds for VMs whose id begins with *mark*, whoever has made it.

        Looks at the host and not at what the driver remembers: an earlier node agent may have made it.

        Raises:
            DriverError: The host does not say.
        """
        ...

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """Remove what `held` has listed. Idempotent; never touches anything of another VM.

        Raises:
            DriverError: It is still there; may be tried again.
        """
        ...
