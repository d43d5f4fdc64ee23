"""A QMP session with one QEMU, on `qemu.qmp`: its errors translated, its event queues kept empty.

Source: QEMU docs/interop/qmp-spec.rst; the package ``qemu.qmp`` 0.0.3 to 0.0.6.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, Message, QMPClient, QMPError, Runstate

from vcnode.aio import finish
from vcnode.errors import HypervisorError

log = logging.getLogger(__name__)

_wire = logging.getLogger(f"{__name__}.wire")
# The package logs every error that it also raises; who wants to see the wire sets this logger's level.
_wire.setLevel(logging.CRITICAL)

CLOSE_LIMIT_S = 2.0

Event = tuple[str, Mapping[str, Any]]
"""Name and data of a QMP event."""


class CommandRefusedError(HypervisorError):
    """QEMU understood the command and said no."""

    def __init__(self, vm_id: str, command: str, error_class: str, words: str = "") -> None:
        super().__init__(f"QEMU refused {command} for VM {vm_id}.", command=command, error_class=error_class)
        self.command = command
        self.error_class = error_class
        self.words = words
        """QEMU's own; not for callers, they may name files of the host."""


class QmpSession:
    """QMP with one VM: connects when first needed and again after a lost connection.

    Args:
        vm_id: For messages.
        path: QMP's UNIX socket, which serves one client at a time.
        on_event: Called for each event, in order, from the event loop; must not raise.
    """

    def __init__(self, vm_id: str, path: Path, on_event: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._vm_id = vm_id
        self._path = path
        self._on_event = on_event
        self._client: QMPClient | None = None
        self._connecting = asyncio.Lock()

    async def connect(self, *, timeout_s: float) -> None:
        """Open the session unless it is open.

        Raises:
            HypervisorError: Nobody answers there within the limit.
        """
        async with self._translated("connect", timeout_s):
            await self._connected()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> Any:
        """Run one command and give its result.

        Raises:
            CommandRefusedError: QEMU answered with an error.
            HypervisorError: No answer within the limit, or the connection was lost; whether the command was
                carried out is unknown.
        """
        async with self._translated(command, timeout_s):
            client = await self._connected()
            return await client.execute(command, arguments)

    async def give_fd(self, fd: int, name: str, *, timeout_s: float) -> None:
        """Let QEMU have a duplicate of *fd*, for commands that name descriptors. Raises as `execute`.

        Source: QEMU qapi/misc.json, ``getfd``; unix(7), SCM_RIGHTS.
        """
        async with self._translated("getfd", timeout_s):
            client = await self._connected()
            client.send_fd_scm(fd)
            await client.execute("getfd", {"fdname": name})

    async def add_fd(self, fd: int, opaque: str, *, timeout_s: float) -> int:
        """Let QEMU have a duplicate of *fd* as a set of its own, for ``/dev/fdset/N``; gives N.

        Raises as `execute`. Source: QEMU qapi/misc.json, ``add-fd``.
        """
        async with self._translated("add-fd", timeout_s):
            client = await self._connected()
            client.send_fd_scm(fd)
            answer = await client.execute("add-fd", {"opaque": opaque})
        number = answer.get("fdset-id") if isinstance(answer, Mapping) else None
        if not isinstance(number, int):
            raise HypervisorError(f"QEMU of VM {self._vm_id} did not say where a descriptor went.")
        return number

    async def ended(self, *, timeout_s: float) -> None:
        """Wait until QEMU has closed the connection, at most so long: all its events have come by then."""
        client = self._client
        if client is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while client.runstate is Runstate.RUNNING:
                    await client.runstate_changed()
        except TimeoutError:
            log.debug("QMP of VM %s did not end within %g s", self._vm_id, timeout_s)

    async def close(self) -> None:
        """End the session; the VM goes on. Idempotent, bounded, never raises but CancelledError."""
        client, self._client = self._client, None
        if client is not None:
            await finish(self._disconnect(client), timeout_s=2 * CLOSE_LIMIT_S)

    async def _connected(self) -> QMPClient:
        async with self._connecting:
            if self._client is not None and self._client.runstate is Runstate.RUNNING:
                return self._client
            await self.close()
            client = QMPClient("wire")
            client.logger = _wire
            # The package's own listener queues every event and remembers it for ever; a filter that takes
            # none lets it serve as a callback.
            client.events.event_filter = self._hear
            self._client = client  # first, so that `close` ends a half-open one as well
            await client.connect(str(self._path))
            return client

    def _hear(self, message: Message) -> bool:
        data = message.get("data")
        self._on_event(str(message.get("event")), data if isinstance(data, Mapping) else {})
        return False

    async def _disconnect(self, client: QMPClient) -> None:
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await client.disconnect()
        except (EOFError, OSError, QMPError, TimeoutError) as exc:
            # `disconnect` raises what ended the session, which its user has seen already.
            log.debug("QMP of VM %s ended by %r", self._vm_id, exc)

    @asynccontextmanager
    async def _translated(self, command: str, timeout_s: float) -> AsyncIterator[None]:
        """Bound a block and turn what it raises into ours."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except ExecuteError as exc:
            log.debug("QEMU refused %s for VM %s: %s", command, self._vm_id, exc)
            raise CommandRefusedError(
                self._vm_id, command, exc.error.error.class_, exc.error.error.desc
            ) from exc
        except TimeoutError as exc:
            raise HypervisorError(
                f"QEMU did not answer {command} for VM {self._vm_id} within {timeout_s:g} s.", command=command
            ) from exc
        except ConnectError as exc:
            raise HypervisorError(f"QMP of VM {self._vm_id} cannot be reached.", command=command) from exc
        except (QMPError, OSError, EOFError) as exc:
            raise HypervisorError(
                f"The QMP connection of VM {self._vm_id} was lost during {command}.", command=command
            ) from exc
