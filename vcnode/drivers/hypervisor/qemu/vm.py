"""Handle of one running QEMU: Protocol Vm."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vcnode.aio import Spawner, deadline_as, finish
from vcnode.drivers.hypervisor.qemu import ports, usage
from vcnode.drivers.hypervisor.qemu.balloon import Balloon
from vcnode.drivers.hypervisor.qemu.disks import Disks
from vcnode.drivers.hypervisor.qemu.explain import Evidence, explain
from vcnode.drivers.hypervisor.qemu.fifolog import FifoLog
from vcnode.drivers.hypervisor.qemu.files import VmFiles
from vcnode.drivers.hypervisor.qemu.migration import Migration
from vcnode.drivers.hypervisor.qemu.process import Process
from vcnode.drivers.hypervisor.qemu.qmp import QmpSession
from vcnode.errors import HypervisorError, NotFoundError, UnavailableError, UnsupportedError
from vcnode.models.pod import StopOutcome
from vcnode.models.stats import VmStats
from vcnode.models.vm import Disk, Port, VmExit, VmRecord

log = logging.getLogger(__name__)

QUIT_WAIT_S = 2.0
"""Rung 2 of the stop ladder: QMP ``quit`` and the end that it brings."""
TERM_WAIT_S = 2.0
"""Rung 3: SIGTERM."""
KILL_WAIT_S = 10.0
"""Rung 4: SIGKILL; the kernel may have much memory to free."""
AFTERMATH_LIMIT_S = 5.0
"""Most that reading the last events and removing the sockets may take."""
LAST_EVENTS_WAIT_S = 1.0
HELPER_WAIT_S = 1.0
END_LIMIT_S = QUIT_WAIT_S * 2 + TERM_WAIT_S + KILL_WAIT_S + AFTERMATH_LIMIT_S


class QemuVm:
    """One QEMU process with its QMP session and logs.

    Made by `QemuHypervisor` once all of its parts live; from then on a watcher task, started by `watch`,
    waits for the end of the process, explains it, and frees everything.
    """

    def __init__(
        self,
        record: VmRecord,
        *,
        process: Process,
        files: VmFiles,
        console: FifoLog,
        stderr: FifoLog,
        helpers: Sequence[Process] = (),
    ) -> None:
        self._helpers = helpers
        self._record = record
        self._process = process
        self._files = files
        self._console = console
        self._stderr = stderr
        self.qmp = QmpSession(record.vm_id, files.qmp_socket, self._on_event)
        self._disks = Disks(record.vm_id, self.qmp, by_descriptor=record.uid is not None)
        self._balloon = Balloon(record.vm_id, self.qmp)
        self.migration = Migration(record.vm_id, self.qmp)
        self.restore_s: float | None = None
        """See Protocol Vm; set by the driver."""
        self._exit: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()
        self._watcher: asyncio.Task[None] | None = None
        self._shutdown_reason: str | None = None
        self._stopping = False
        self._paused = False

    @property
    def record(self) -> VmRecord:
        """See Protocol Vm."""
        return self._record

    def channel(self, channel_id: str) -> Path:
        """See Protocol Vm."""
        return self._files.channel(channel_id)

    @property
    def paused(self) -> bool:
        """See Protocol Vm."""
        return self._paused

    @property
    def stderr_text(self) -> str:
        """QEMU's last words so far."""
        self._stderr.drain()
        return self._stderr.text()

    async def exit_code_within(self, seconds: float) -> int | None:
        """QEMU's exit code, if it ends within *seconds*."""
        return await self._process.wait() if await self._process.ended_within(seconds) else None

    def watch(self, tasks: Spawner) -> None:
        """Begin to wait for the end of the process."""
        self._watcher = tasks.spawn(self._watch(), name=f"watch VM {self._record.vm_id}")

    async def wait(self) -> VmExit:
        """See Protocol Vm. Raises UnavailableError when the handle is closed before the VM ends."""
        return await asyncio.shield(self._exit)

    # -- devices and vCPUs ---------------------------------------------------------------------------------

    async def attach_disk(self, disk: Disk, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        if disk.fd is None and not await asyncio.to_thread(os.path.isfile, disk.path):
            raise NotFoundError(f"There is no file {disk.path} to attach to VM {self._record.vm_id}.")
        async with deadline_as(timeout_s, lambda: self._late("attach_disk", timeout_s)):
            await self._disks.attach(disk)

    async def detach_disk(self, disk_id: str, *, timeout_s: float) -> None:
        """See Protocol Vm. Succeeds when the VM has ended: its disks went with it."""
        if self._process.alive:
            async with deadline_as(timeout_s, lambda: self._late("detach_disk", timeout_s)):
                await self._disks.detach(disk_id)

    async def attach_port(self, port: Port, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        async with deadline_as(timeout_s, lambda: self._late("attach_port", timeout_s)):
            await ports.attach(self._record.vm_id, self.qmp, port)

    async def pause(self, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        await self.qmp.execute("stop", timeout_s=timeout_s)
        self._paused = True

    async def resume(self, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        await self.qmp.execute("cont", timeout_s=timeout_s)
        self._paused = False

    async def read_console(self, max_bytes: int, *, timeout_s: float) -> str:
        """See Protocol Vm."""
        self._console.drain()
        async with deadline_as(timeout_s, lambda: self._late("read_console", timeout_s)):
            return await asyncio.to_thread(self._console.read, max_bytes)

    async def set_memory(self, mem_size_mib: int, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        if not self._record.balloon:
            raise UnsupportedError(f"VM {self._record.vm_id} has no balloon.")
        await self._balloon.set(mem_size_mib, timeout_s=timeout_s)

    async def query_paused(self, *, timeout_s: float) -> None:
        """Learn from QEMU whether the vCPUs are stopped, after a restart of the node agent."""
        status = await self.qmp.execute("query-status", timeout_s=timeout_s)
        self._paused = status.get("status") == "paused"

    async def read_stats(
        self, *, mem_size_mib: int, interfaces: Mapping[str, str], memory: bool, timeout_s: float
    ) -> VmStats:
        """See `vcnode.drivers.base.Measurable`."""
        gone = HypervisorError(f"VM {self._record.vm_id} has ended; there is nothing to measure.")
        if not self._process.alive:
            raise gone
        read = functools.partial(
            usage.read,
            self._process.pid,
            self._process.start_ticks,
            self._files.group,
            mem_size_mib=mem_size_mib,
            interfaces=interfaces,
            memory=memory,
        )
        try:
            async with deadline_as(timeout_s, lambda: self._late("read_stats", timeout_s)):
                return await asyncio.to_thread(read)
        except usage.GoneError:
            raise gone from None

    # -- the end -------------------------------------------------------------------------------------------

    async def stop(self, *, grace_s: float) -> StopOutcome:
        """See Protocol Vm. ``graceful`` only when the guest ended by itself within *grace_s*.

        A paused guest cannot, so it gets no grace; 0 kills at once. The call can last `END_LIMIT_S` longer.
        """
        if not self._process.alive:
            await self._aftermath()
            return "absent"
        self._stopping = True
        try:
            if grace_s > 0 and not self._paused and await self._process.ended_within(grace_s):
                await self._aftermath()
                return "graceful"
        except asyncio.CancelledError:
            await finish(self._end(politely=False), timeout_s=END_LIMIT_S)
            raise
        await finish(self._end(politely=grace_s > 0), timeout_s=END_LIMIT_S)
        return "forced"

    async def close(self) -> None:
        """See Protocol Vm."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        await self.release()

    async def release(self) -> None:
        """Free what the handle holds; process and files stay. Idempotent."""
        self._let_go()
        await self.qmp.close()

    def _let_go(self) -> None:
        for process in (self._process, *self._helpers):
            process.release()
        self._console.close()
        self._stderr.close()
        if not self._exit.done():
            self._exit.set_exception(
                UnavailableError(f"The handle of VM {self._record.vm_id} was closed; the VM goes on.")
            )
            self._exit.exception()  # nobody need wait for it

    async def kill(self) -> None:
        """End the process without asking, and free everything. For a launch that failed."""
        self._kill()
        try:
            if not await self._process.ended_within(KILL_WAIT_S):
                raise self._unkillable()
            await self._end_helpers()
        finally:
            await self.release()
        self._files.remove()

    async def _end(self, *, politely: bool) -> None:
        """Walk down the ladder until the process is gone and everything is freed."""
        if politely:
            await self._quit()
            if not await self._process.ended_within(QUIT_WAIT_S):
                self._process.signal(signal.SIGTERM)
                await self._process.ended_within(TERM_WAIT_S)
        if self._process.alive:
            self._kill()
            if not await self._process.ended_within(KILL_WAIT_S):
                raise self._unkillable()
        await self._aftermath()

    async def _end_helpers(self) -> None:
        """See that the processes beside QEMU have ended, as they do when it hangs up."""
        for helper in self._helpers:
            if not await helper.ended_within(HELPER_WAIT_S):
                helper.signal(signal.SIGKILL)
                await helper.ended_within(HELPER_WAIT_S)

    def _kill(self) -> None:
        self._files.group.kill()
        self._process.signal(signal.SIGKILL)

    async def _quit(self) -> None:
        try:
            await self.qmp.execute("quit", timeout_s=QUIT_WAIT_S)
        except HypervisorError as exc:
            # It may hang up before it answers, or not answer at all: the next rung shows which.
            log.debug("QMP quit of VM %s: %s", self._record.vm_id, exc)

    async def _aftermath(self) -> None:
        """Wait until the watcher has explained the end and removed sockets and FIFOs."""
        if self._watcher is not None:
            await asyncio.wait({self._watcher}, timeout=AFTERMATH_LIMIT_S)
        self._files.remove()

    async def _watch(self) -> None:
        try:
            await self._see_to_the_end()
        finally:
            self._let_go()  # also when the node agent goes down first: nobody may wait for ever
        await self.qmp.close()

    async def _miss(self, helper: Process) -> None:
        """Say so when a helper ends before the VM does."""
        code = await helper.wait()
        if await self._process.ended_within(LAST_EVENTS_WAIT_S):
            return
        log.warning(
            "VM %s has lost its virtiofsd %s (exit code %s): nobody answers for the volume that it served"
            " until the pod's next start",
            self._record.vm_id,
            helper.pid,
            code,
        )

    async def _see_to_the_end(self) -> None:
        missing = [asyncio.ensure_future(self._miss(helper)) for helper in self._helpers]
        try:
            exit_code = await self._process.wait()
        finally:
            for watch in missing:
                watch.cancel()
        await self._end_helpers()
        await self.qmp.ended(timeout_s=LAST_EVENTS_WAIT_S)
        self._console.drain()
        self._stderr.drain()
        found = explain(
            Evidence(
                exit_code=exit_code,
                shutdown=self._shutdown_reason,
                console=self._console.text(),
                stopping=self._stopping,
            )
        )
        self._files.remove()
        if not self._exit.done():
            self._exit.set_result(found)
        level = logging.INFO if found.expected else logging.WARNING
        log.log(level, "VM %s ended: %s\n%s", self._record.vm_id, found.reason, self._stderr.text())

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        self._disks.on_event(name, data)
        self.migration.on_event(name, data)
        self._balloon.on_event(name)
        match name:
            case "SHUTDOWN" if self._shutdown_reason is None:
                self._shutdown_reason = str(data.get("reason"))
            case "GUEST_PANICKED":
                self._shutdown_reason = "guest-panic"
            case "STOP":
                self._paused = True
            case "RESUME":
                self._paused = False

    def _late(self, verb: str, timeout_s: float) -> HypervisorError:
        return HypervisorError(f"{verb} of VM {self._record.vm_id} did not end within {timeout_s:g} s.")

    def _unkillable(self) -> HypervisorError:
        return HypervisorError(
            f"Process {self._process.pid} of VM {self._record.vm_id} is still there {KILL_WAIT_S:g} s after"
            " SIGKILL; it hangs in the host's kernel."
        )
