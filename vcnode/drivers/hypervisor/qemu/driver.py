"""Protocol Hypervisor on QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vcnode.aio import Spawner, deadline_as, finish
from vcnode.drivers.audit import Held
from vcnode.drivers.base import TemplateInfo, Vm
from vcnode.drivers.exhaustion import exhausted
from vcnode.drivers.hypervisor.qemu import accel, hugepages, privileges, slot, tsc, vhost, virtiofsd, words
from vcnode.drivers.hypervisor.qemu.argv import Launch, build, inherited_fds, own_guest
from vcnode.drivers.hypervisor.qemu.cgroup import Cgroup, Cgroups, Limits, disk_of
from vcnode.drivers.hypervisor.qemu.fifolog import FifoLog
from vcnode.drivers.hypervisor.qemu.files import VmFiles, listen
from vcnode.drivers.hypervisor.qemu.machines import Architecture, choose, host_architecture
from vcnode.drivers.hypervisor.qemu.process import Process, adopt, find, named
from vcnode.drivers.hypervisor.qemu.sources import Source, Sources
from vcnode.drivers.hypervisor.qemu.spawner import SPAWNERS
from vcnode.drivers.hypervisor.qemu.templates import BrokenTemplateError
from vcnode.drivers.hypervisor.qemu.vm import KILL_WAIT_S, QemuVm
from vcnode.errors import HypervisorError, InvalidArgumentError, UnsupportedError
from vcnode.models.hypervisor import HypervisorConfig
from vcnode.models.node import DriverInfo
from vcnode.models.pod import HypervisorType, Resources
from vcnode.models.vm import VmRecord, VmShape, VmSpec
from vcnode.settings import QemuSettings

log = logging.getLogger(__name__)

UNDO_LIMIT_S = KILL_WAIT_S + 5.0
TERM_WAIT_S = 2.0
LAST_WORDS_WAIT_S = 1.0
"""Between QEMU's hanging up and its end."""


@dataclass(frozen=True, slots=True)
class Guest:
    """The guest image that every VM boots."""

    kernel: Path
    """On x86_64 an uncompressed ELF, on aarch64 an ``Image``."""
    initrd: Path
    """Its initramfs."""


class QemuHypervisor:
    """Runs each VM as one QEMU process that outlives the node agent.

    Args:
        settings: Binary, accelerator, limits.
        guest: What to boot.
        state_dir: Where the accelerator's test result is kept.
        run_dir: Holds the directories of VMs, in ``vms``.
        tasks: Owner of the watcher of each VM.
        architecture: Of the guests. Default: the host's.
    """

    def __init__(
        self,
        settings: QemuSettings,
        guest: Guest,
        *,
        state_dir: Path,
        run_dir: Path = Path("/run/vcnode"),
        tasks: Spawner,
        architecture: Architecture | None = None,
    ) -> None:
        self._vms = Path(os.path.realpath(run_dir)) / "vms"
        self._spawner = SPAWNERS[settings.spawner]
        self._virtiofsd = virtiofsd.find()
        self._settings = settings
        self._guest = guest
        self._state_dir = state_dir
        self._tasks = tasks
        self._architecture = architecture or host_architecture()
        self._build: accel.Build | None = None
        self._choice: accel.Choice | None = None
        self._kernel_params: tuple[str, ...] = ()
        self._notes: tuple[str, ...] = ()
        self._sources = Sources(state_dir / "templates")
        self._setpriv: str | None = None
        self._uids: set[int] = set()
        """Given to launches under way."""

    @functools.cached_property
    def _cgroups(self) -> Cgroups:
        disk = disk_of(self._state_dir)
        return Cgroups.find(disks=() if disk is None else (disk,))

    @property
    def info(self) -> DriverInfo:
        """See Protocol Hypervisor."""
        return DriverInfo(
            type=HypervisorType.QEMU,
            version=self._build.version if self._build else None,
            capabilities=(
                *("balloon", "disks", "firmware", "image", "initrd", "kernel", "pause", "ports", "recover"),
                *("share", "stats", "templates"),
                *(("virtio-fs",) if self._virtiofsd is not None else ()),
            ),
            notes=self._notes,
        )

    @property
    def accelerator(self) -> str | None:
        """See Protocol Hypervisor."""
        return self._choice.accelerator if self._choice else None

    async def open(self) -> None:
        """Find QEMU, choose the accelerator, and see that there is a guest image.

        Raises:
            HypervisorError: One of them is missing or does not work; says what to do.
        """
        self._check_guest()
        if self._settings.uid_base is not None:
            self._setpriv = privileges.find_setpriv()
        arch = self._architecture
        self._build = await accel.find_build(self._settings.binary or arch.qemu, package=arch.package)
        self._choice = await accel.choose(
            self._settings.accel,
            self._build,
            state_dir=self._state_dir,
            timeout_s=self._settings.probe_timeout_s,
            arch=arch,
            guest=(self._guest.kernel, self._guest.initrd),
        )
        self._notes = (self._choice.reason, *((self._cgroups.note,) if self._cgroups.note else ()))
        if self._choice.accelerator == "tcg" and arch.name == "x86_64":
            await self._tell_tsc()
        await self._sources.open(self._build.key, self._choice.accelerator, *own_guest(self._architecture))
        log.info("QEMU %s with %s: %s", self._build.version, self.accelerator, self._choice.reason)

    def check(self, config: HypervisorConfig, resources: Resources) -> None:
        """See Protocol Hypervisor."""
        choose(
            self._architecture,
            config.machine_type,
            from_disk=config.from_disk,
            firmware=config.firmware_path is not None,
        )
        if config.huge_pages and (page_mib := hugepages.page_mib()) and resources.mem_size_mib % page_mib:
            raise InvalidArgumentError.field(
                "pod.resources.mem_size_mib",
                f"must be a multiple of {page_mib}, the size of the host's huge pages in MiB",
            )

    async def launch(self, spec: VmSpec, *, timeout_s: float) -> QemuVm:
        """See Protocol Hypervisor. A failed launch takes up to `UNDO_LIMIT_S` longer to undo."""
        late = HypervisorError(f"QEMU of VM {spec.vm_id} did not answer within {timeout_s:g} s.")
        async with deadline_as(timeout_s, lambda: late):
            return await self._launch(spec, timeout_s)

    async def recover(self, record: VmRecord, *, timeout_s: float) -> QemuVm | None:
        """See Protocol Hypervisor. A record without a pid is looked for among all processes."""
        process = await self._hold(record)
        if process is None:
            self._files(record).remove()
            return None
        late = HypervisorError(f"QEMU of VM {record.vm_id} did not answer within {timeout_s:g} s.")
        vm = self._take_over(record, process)
        try:
            async with deadline_as(timeout_s, lambda: late):
                await self._join(vm, timeout_s)
            vm.watch(self._tasks)
            return vm
        except BaseException:
            await finish(vm.release(), timeout_s=UNDO_LIMIT_S)
            raise

    async def kill(self, record: VmRecord, *, timeout_s: float) -> bool:
        """See Protocol Hypervisor: SIGTERM, and SIGKILL after `TERM_WAIT_S`."""
        files = self._files(record)
        process = await self._hold(record)
        if process is None:
            files.remove()
            return False
        await _end(process, record.vm_id, files.group, timeout_s)
        files.remove()
        return True

    async def held(self, mark: str) -> Sequence[Held]:
        """See Protocol Auditable: QEMU processes by pid, cgroups, and templates."""
        running = await asyncio.to_thread(named, mark)
        helping = await asyncio.to_thread(virtiofsd.named, self._vms, mark)
        pids = [(found.pid, found.vm_id) for found in running] + [(h.pid, h.vm_id) for h in helping]
        processes = [Held("process", str(pid), vm_id) for pid, vm_id in pids]
        groups = [
            Held("cgroup", str(self._cgroups.of(vm_id).path), vm_id) for vm_id in self._cgroups.ids(mark)
        ]
        return [*processes, *groups, *await self._sources.held(mark)]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See Protocol Auditable."""
        if held.vm_id is None:
            raise HypervisorError(f"{held.kind} {held.name} is of no VM.")
        if held.kind == "process":
            for found in await asyncio.to_thread(named, held.vm_id):
                if found.vm_id == held.vm_id:
                    process = adopt(found.pid, found.start_ticks, found.uuid)
                    if process is not None:
                        await _end(process, found.vm_id, self._cgroups.of(found.vm_id), timeout_s)
            for helper in await asyncio.to_thread(virtiofsd.named, self._vms, held.vm_id):
                if helper.vm_id == held.vm_id and (process := adopt(helper.pid, helper.start_ticks)):
                    await _end(process, helper.vm_id, self._cgroups.of(helper.vm_id), timeout_s)
        elif held.kind == "cgroup":
            group = self._cgroups.of(held.vm_id)
            group.kill()
            if not group.remove():
                raise HypervisorError(f"{held.name} cannot be removed yet: what was in it is still ending.")
        else:
            await self._sources.discard(held.vm_id)

    async def close(self) -> None:
        """Free the memory of the templates; each VM's handle holds its own."""
        self._sources.close()

    # -- templates -----------------------------------------------------------------------------------------

    def template_key(self, shape: VmShape) -> str:
        """See Protocol Templating."""
        return self._sources.key(shape, (self._guest.kernel, self._guest.initrd))

    async def list_templates(self) -> Sequence[TemplateInfo]:
        """See Protocol Templating."""
        return await self._sources.list()

    async def load_template(self, key: str, *, timeout_s: float) -> bool:
        """See Protocol Templating."""
        return await self._sources.load(key, timeout_s=timeout_s)

    async def save_template(self, vm: Vm, *, timeout_s: float) -> None:
        """See Protocol Templating."""
        if not isinstance(vm, QemuVm):
            raise HypervisorError(f"VM {vm.record.vm_id} does not run on QEMU.")
        await self._sources.save(vm, timeout_s=timeout_s)

    async def drop_template(self, key: str) -> None:
        """See Protocol Templating."""
        await self._sources.drop(key)

    # -- launch --------------------------------------------------------------------------------------------

    async def _launch(self, spec: VmSpec, timeout_s: float) -> QemuVm:
        self._check_guest()
        files = self._files(spec)
        files.check(spec.channels)
        if spec.config.huge_pages:
            hugepages.require(spec.mem_size_mib)
        vm: QemuVm | None = None
        argv: Sequence[str] = ()
        uid = await self._user_for(spec)
        try:
            vm, argv, state_fd = self._start(spec, files, uid)
            await self._greet(vm, timeout_s)
            if spec.clone_of is not None:
                await self._restore(vm, spec.clone_of, state_fd, timeout_s)
            vm.watch(self._tasks)
            return vm
        except BaseException as exc:
            if vm is not None:
                said = f"{shlex.join(argv)}\n{vm.stderr_text}"
                level = logging.ERROR if isinstance(exc, Exception) else logging.WARNING  # or cancelled
                log.log(level, "QEMU of VM %s did not start (%r): %s", spec.vm_id, exc, said)
                await finish(vm.kill(), timeout_s=UNDO_LIMIT_S)
            files.remove()
            self._sources.forget(spec.vm_id)
            raise
        finally:
            if uid is not None:  # from here on the process itself shows that it is taken
                self._uids.discard(uid)

    async def _restore(self, vm: QemuVm, key: str, state_fd: int | None, timeout_s: float) -> None:
        if state_fd is None:
            raise HypervisorError(f"VM {vm.record.vm_id} has no state to start from.")
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await vm.migration.restore(state_fd, timeout_s=timeout_s)
            vm.restore_s = loop.time() - began
        except HypervisorError as exc:
            await self._sources.drop(key)
            raise BrokenTemplateError(f"QEMU could not resume a clone of template {key}.") from exc

    async def _user_for(self, spec: VmSpec) -> int | None:
        """The user id that a VM gets to itself; None: it runs as the node agent does."""
        base = self._settings.uid_base
        # What becomes a template runs no workload, and maps a file of the state directory.
        if base is None or spec.host_dirs or spec.template_key is not None:
            return None
        taken = self._uids | await asyncio.to_thread(privileges.users)
        uid = privileges.choose(spec.vm_id, base, self._settings.uid_count, taken)
        self._uids.add(uid)
        return uid

    def _limits(self, spec: VmSpec) -> Limits | None:
        """What the VM's cgroup bounds it to."""
        settings = self._settings
        if not settings.cgroup_limits:
            return None
        cache_mib = settings.tcg_cache_mib if self.accelerator == "tcg" else 0
        io = None if settings.io_max_mib_per_s is None else round(settings.io_max_mib_per_s * (1 << 20))
        return Limits.of(spec.vcpu_count, spec.mem_size_mib, cache_mib, io_bytes_per_s=io)

    def _confine(self, launch: Launch, uid: int, ours: contextlib.ExitStack) -> Launch:
        """The same launch with nothing in it that an ordinary user could not open.

        Its working directory is the VM's own, which it may go through but not list or write to.
        """
        fds = []
        for fd in launch.spec.config.file_fds:  # disks are used as they were opened
            privileges.check_readable(fd)
        for path in (launch.kernel, launch.initrd):
            fds.append(privileges.open_for_all(path))
            ours.callback(os.close, fds[-1])
        kernel, initrd = (Path(f"/proc/self/fd/{fd}") for fd in fds)
        return replace(
            launch,
            kernel=kernel,
            initrd=initrd,
            file_fds=tuple(fds),
            console=Path(launch.console.name),
            share=Path(Path(launch.spec.shared_dir).name),
        )

    def _start(
        self, spec: VmSpec, files: VmFiles, uid: int | None
    ) -> tuple[QemuVm, Sequence[str], int | None]:
        """Make files and process; on an error the caller removes the files."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as undo:
            try:
                files.make_fifos(uid)
                qmp = ours.enter_context(listen(files.qmp_socket))
                channels = [
                    ours.enter_context(listen(files.channel(channel.channel_id))) for channel in spec.channels
                ]
                console, stderr = self._open_logs(files, undo)
                # Does not fail for want of a reader, as `stderr` is one; QEMU shall never wait for us.
                stderr_fd = os.open(files.stderr_fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                ours.callback(os.close, stderr_fd)
            except OSError as exc:
                late = HypervisorError(f"The sockets of VM {spec.vm_id} could not be made.")
                raise exhausted(exc) or late from exc
            files.group.make(self._limits(spec))
            helpers = self._start_helpers(spec, files, stderr_fd, ours, undo)
            source = self._sources.take(spec, ours)
            channel_fds = tuple(channel.fileno() for channel in channels)
            launch = self._describe(spec, files, source, qmp.fileno(), channel_fds)
            if launch.accelerator == "kvm":  # TCG has no use for it: no interrupts without QEMU
                launch = replace(launch, vhost_fds=vhost.open_for(len(spec.netdevs), ours))
            launch = replace(
                launch,
                virtio_fs_fds=tuple(connection.fileno() for _, connection in helpers),
                slot_fd=slot.open_for(spec, ours),
            )
            if uid is not None:
                launch = self._confine(launch, uid, ours)
            argv = build(launch)
            if uid is not None and self._setpriv is not None:
                groups = privileges.kvm_groups() if launch.accelerator == "kvm" else ()
                argv = [*privileges.prefix(self._setpriv, uid, groups), *argv]
            fds = inherited_fds(launch)
            process = self._spawner.spawn(
                argv,
                stderr_fd=stderr_fd,
                fds=fds,
                directory=files.directory,
                netns_path=spec.netns_path,
                huge_pages=launch.accelerator != "tcg",
            )
            files.group.take(process.pid)
            undo.pop_all()
            record = self._make_record(spec, process, uid, [helper for helper, _ in helpers])
            vm = QemuVm(
                record,
                process=process,
                files=files,
                console=console,
                stderr=stderr,
                helpers=[process for process, _ in helpers],
            )
            return vm, argv, source.state_fd

    def _start_helpers(
        self,
        spec: VmSpec,
        files: VmFiles,
        stderr_fd: int,
        ours: contextlib.ExitStack,
        undo: contextlib.ExitStack,
    ) -> list[tuple[Process, socket.socket]]:
        """Start what serves directories by virtio-fs; each with QEMU's end of its connection.

        They end with that.
        """
        helpers = []
        for share in spec.shares:
            if not share.virtio_fs:
                continue
            if self._virtiofsd is None:
                raise UnsupportedError("This node has no virtiofsd.")
            try:
                process, connection = virtiofsd.start(
                    self._spawner,
                    self._virtiofsd,
                    share.directory,
                    stderr_fd=stderr_fd,
                    vm_dir=files.directory,
                    netns_path=spec.netns_path,
                )
            except OSError as exc:
                raise exhausted(exc) or HypervisorError("virtiofsd could not be connected.") from exc
            undo.callback(process.signal, signal.SIGKILL)
            ours.enter_context(connection)
            files.group.take(process.pid)
            helpers.append((process, connection))
        return helpers

    def _describe(
        self, spec: VmSpec, files: VmFiles, source: Source, qmp_fd: int, channel_fds: tuple[int, ...]
    ) -> Launch:
        if self._build is None or self._choice is None:
            raise HypervisorError("The QEMU driver was used before it was opened.")
        return Launch(
            binary=self._build.path,
            architecture=self._architecture,
            accelerator=self._choice.accelerator,
            tcg_cache_mib=self._settings.tcg_cache_mib,
            spec=spec,
            kernel=self._guest.kernel,
            initrd=self._guest.initrd,
            kernel_params=self._kernel_params,
            qmp_fd=qmp_fd,
            channel_fds=channel_fds,
            console=files.console,
            ram_file=source.ram_file,
            ram_share=source.ram_share,
            ram_fd=source.ram_fd,
            state_fd=source.state_fd,
            incoming=source.incoming,
        )

    def _make_record(
        self, spec: VmSpec, process: Process, uid: int | None, helpers: Sequence[Process]
    ) -> VmRecord:
        return VmRecord(
            vm_id=spec.vm_id,
            uuid=spec.uuid,
            directory=spec.directory,
            type=HypervisorType.QEMU,
            pid=process.pid,
            pid_start_ticks=process.start_ticks,
            accelerator=self.accelerator,
            helpers=tuple((helper.pid, helper.start_ticks) for helper in helpers),
            uid=uid,
            balloon=spec.balloon and spec.clone_of is None and spec.template_key is None,
            slot_digest=spec.slot.digest if spec.slot is not None and spec.has_slot else None,
        )

    def _open_logs(self, files: VmFiles, undo: contextlib.ExitStack) -> tuple[FifoLog, FifoLog]:
        """Begin to read the console and QEMU's standard error. Raises OSError."""
        max_bytes = self._settings.console_max_bytes
        console = FifoLog(files.console_fifo, files.console_log, max_bytes=max_bytes)
        undo.callback(console.close)
        stderr = FifoLog(files.stderr_fifo, files.stderr_log, max_bytes=max_bytes)
        undo.callback(stderr.close)
        return console, stderr

    async def _greet(self, vm: QemuVm, timeout_s: float) -> None:
        """Wait for QMP's greeting. A QEMU that ends instead is told by its closing the socket."""
        try:
            await vm.qmp.connect(timeout_s=timeout_s)
        except HypervisorError as exc:
            exit_code = await vm.exit_code_within(LAST_WORDS_WAIT_S)
            if exit_code is None:
                raise
            raise words.ended(vm.record.vm_id, vm.stderr_text, exit_code) from exc

    # -- recover -------------------------------------------------------------------------------------------

    async def _hold(self, record: VmRecord) -> Process | None:
        pid, ticks = record.pid, record.pid_start_ticks
        if pid is None or ticks is None:
            found = await asyncio.to_thread(find, record.uuid)
            if found is None:
                return None
            pid, ticks = found
        return adopt(pid, ticks, record.uuid)

    def _files(self, vm: VmRecord | VmSpec) -> VmFiles:
        return VmFiles(Path(vm.directory), self._cgroups.of(vm.vm_id))

    def _take_over(self, record: VmRecord, process: Process) -> QemuVm:
        """The handle of a process that was held again; lets go of it on failure."""
        files = self._files(record)
        with contextlib.ExitStack() as undo:
            undo.callback(process.release)
            try:
                console, stderr = self._open_logs(files, undo)
            except OSError as exc:
                raise HypervisorError(f"The console of VM {record.vm_id} cannot be opened.") from exc
            undo.pop_all()
        files.group.make()  # its node agent may have ended before it did so
        files.group.take(process.pid)
        known = record.model_copy(update={"pid": process.pid, "pid_start_ticks": process.start_ticks})
        found = (adopt(pid, ticks) for pid, ticks in record.helpers)
        return QemuVm(
            known,
            process=process,
            files=files,
            console=console,
            stderr=stderr,
            helpers=[helper for helper in found if helper is not None],
        )

    async def _join(self, vm: QemuVm, timeout_s: float) -> None:
        await vm.qmp.connect(timeout_s=timeout_s)
        answer = await vm.qmp.execute("query-uuid", timeout_s=timeout_s)
        if answer.get("UUID") != vm.record.uuid:
            raise HypervisorError(f"The QEMU at the socket of VM {vm.record.vm_id} is another VM.")
        await vm.query_paused(timeout_s=timeout_s)

    # -- open ----------------------------------------------------------------------------------------------

    def _check_guest(self) -> None:
        for path in (self._guest.kernel, self._guest.initrd):
            if not path.is_file():
                raise HypervisorError(
                    f"The guest image lacks {path}; make it with 'vcnode guest build'.", path=str(path)
                )

    async def _tell_tsc(self) -> None:
        khz = await asyncio.to_thread(tsc.measure_khz)
        if khz is None:
            self._notes += ("The host's TSC cannot be measured; a guest on a busy host may hang at boot.",)
        else:
            # Without "reliable" the guest's watchdog compares it with jiffies, which a busy host delays, and
            # falls back to them for good: a clock of 4 ms steps that loses ticks.
            self._kernel_params = (f"tsc_early_khz={khz}", "tsc=reliable")


async def _end(process: Process, vm_id: str, group: Cgroup, timeout_s: float) -> None:
    """End a process: SIGTERM, and SIGKILL after `TERM_WAIT_S`; lets go of it in any case.

    Raises:
        HypervisorError: It survived.
    """
    try:
        process.signal(signal.SIGTERM)
        if not await process.ended_within(min(TERM_WAIT_S, timeout_s)):
            process.signal(signal.SIGKILL)
            group.kill()
            if not await process.ended_within(max(timeout_s - TERM_WAIT_S, 1.0)):
                raise HypervisorError(f"Process {process.pid} of VM {vm_id} survived SIGKILL.")
    except asyncio.CancelledError:
        process.signal(signal.SIGKILL)
        group.kill()
        raise
    finally:
        process.release()
