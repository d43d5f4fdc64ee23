"""Opens sessions with hyperstart in guests of the user's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import vcnode
from vcnode.aio import deadline_as
from vcnode.drivers.agent.hyperstart.link import Link
from vcnode.drivers.agent.hyperstart.messages import SHARE_TAG
from vcnode.drivers.agent.hyperstart.session import HyperSession
from vcnode.drivers.base import PLAIN_ACCESS, AgentAccess, GuestSession, Vm
from vcnode.errors import AgentError
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, AgentType
from vcnode.models.vm import Channel

CTL, TTY = "ctl", "tty"
_SOCKET_INTERVAL_S = 0.02
_PROBE_INTERVAL_S = 1.0


class HyperstartAgent:
    """The `GuestAgent` for VMs that run hyperstart (docs/agents.md)."""

    @property
    def info(self) -> DriverInfo:
        """See `GuestAgent.info`."""
        return DriverInfo(
            type=AgentType.HYPERSTART,
            version=vcnode.__version__,
            capabilities=("attach", "containers", "copy", "exec", "tty"),
        )

    @property
    def share_tag(self) -> str:
        """See `GuestAgent.share_tag`."""
        return SHARE_TAG

    def channels(self, config: AgentConfig) -> tuple[Channel, ...]:
        """See `GuestAgent.channels`."""
        ports = config.hyperstart
        return (
            Channel(channel_id=CTL, name=ports.ctl_port),
            Channel(channel_id=TTY, name=ports.tty_port),
        )

    async def connect(self, vm: Vm, *, access: AgentAccess = PLAIN_ACCESS, timeout_s: float) -> GuestSession:
        """See `GuestAgent.connect`. On failure and cancellation no socket is left."""
        vm_id = vm.record.vm_id
        fork = access.config.hyperstart.dialect == "clearcontainers"
        late = AgentError(
            f"hyperstart in {vm_id} did not answer within {timeout_s:g} s; its console says what runs there."
        )
        async with deadline_as(timeout_s, lambda: late):
            session = HyperSession(vm_id, Path(vm.record.directory), fork=fork)
            dialogue = session.dialogue
            try:
                await _open(vm.channel(CTL), dialogue.ctl, vm_id)
                await _open(vm.channel(TTY), dialogue.tty, vm_id)
                dialogue.greet()
                while not dialogue.opened.done():
                    await asyncio.wait({dialogue.opened}, timeout=_PROBE_INTERVAL_S)
                    dialogue.probe_again()
                session.check()
            except BaseException:
                dialogue.abort()
                raise
            return session


async def _open(path: Path, link: Link, vm_id: str) -> None:
    """Connect to one of the VM's ports, waiting until QEMU listens there."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            await loop.create_unix_connection(lambda: link, str(path))
            return
        except (FileNotFoundError, ConnectionRefusedError):
            await asyncio.sleep(_SOCKET_INTERVAL_S)  # nothing announces a socket
        except OSError as exc:
            raise AgentError(f"The agent port of {vm_id} cannot be reached.") from exc
