"""Opens sessions with the agents of guests."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import vcnode
from vcnode.aio import deadline_as
from vcnode.drivers.agent.native.session import NativeSession
from vcnode.drivers.base import PLAIN_ACCESS, AgentAccess, GuestSession, Vm
from vcnode.errors import AgentError
from vcnode.guest import protocol
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, AgentType
from vcnode.models.vm import AGENT_CHANNELS, SHARE_TAG, Channel

_SOCKET_INTERVAL_S = 0.02
_SYNC_INTERVAL_S = 1.0
_SYNC_INTERVAL_MAX_S = 5.0


class NativeAgent:
    """The `GuestAgent` for VMs that run vcnode's own guest image."""

    @property
    def info(self) -> DriverInfo:
        """See `GuestAgent.info`."""
        return DriverInfo(
            type=AgentType.NATIVE,
            version=vcnode.__version__,
            capabilities=(
                *(
                    "attach",
                    "configure",
                    "containers",
                    "copy",
                    "exec",
                    "forward",
                    "images",
                    "limits",
                    "mounts",
                ),
                *("privileges", "probes", "readonly", "secrets", "stats", "tty", "watchdog"),
            ),
        )

    @property
    def share_tag(self) -> str:
        """See `GuestAgent.share_tag`."""
        return SHARE_TAG

    def channels(self, config: AgentConfig) -> tuple[Channel, ...]:
        """See `GuestAgent.channels`."""
        return AGENT_CHANNELS

    async def connect(self, vm: Vm, *, access: AgentAccess = PLAIN_ACCESS, timeout_s: float) -> GuestSession:
        """See `GuestAgent.connect`. A session that the guest has with somebody else ends.

        On failure and cancellation no socket is left.
        """
        vm_id = vm.record.vm_id
        async with deadline_as(
            timeout_s,
            lambda: AgentError(f"The guest agent of {vm_id} did not answer within {timeout_s:g} s."),
        ):
            host = protocol.Host(secrets.token_hex(16))
            session = NativeSession(vm_id, host)
            try:
                await _open_socket(vm.channel(AGENT_CHANNELS[0].channel_id), session)
                await _say_hello(host, session)
            except BaseException:
                session.link.abort()
                raise
            return session


async def _open_socket(path: Path, session: NativeSession) -> None:
    """Connect to the VM's port, waiting until QEMU listens there."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            await loop.create_unix_connection(lambda: session.link, str(path))
            return
        except (FileNotFoundError, ConnectionRefusedError):
            # The hypervisor's launch returns after QEMU has made its sockets, so this is the rare case of a
            # caller that is quicker; nothing announces a socket, so look again.
            await asyncio.sleep(_SOCKET_INTERVAL_S)
        except OSError as exc:
            raise AgentError(f"The agent port of {session.vm_id} cannot be reached.") from exc


async def _say_hello(host: protocol.Host, session: NativeSession) -> None:
    """Send the sync until the guest answers it.

    Once is enough with QEMU as it is: its serial port reads nothing from the socket while the guest has not
    opened its side (hw/char/virtio-serial-bus.c, virtio_serial_guest_ready), so the sync of a host that comes
    early waits in the socket. But the contract promises less (a byte stream that may lose what is in flight),
    and the socket cannot tell when the guest opens its side, so the sync is repeated: rarely, for each copy
    costs a booting guest a little, and only if the socket took all of the previous one.
    """
    interval_s = _SYNC_INTERVAL_S
    while not session.opened.done():
        if session.link.is_drained:
            host.send_sync()
            session.link.flush()
        await asyncio.wait({session.opened}, timeout=interval_s)
        interval_s = min(2 * interval_s, _SYNC_INTERVAL_MAX_S)
    session.check()
