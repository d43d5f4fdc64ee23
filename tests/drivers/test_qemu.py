"""The QEMU driver with real VMs: what only a real process, kernel and console can show."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.support import guests
from vcnode.aio import Tasks
from vcnode.drivers.hypervisor.qemu import Guest, QemuHypervisor, QemuVm
from vcnode.drivers.hypervisor.qemu.cgroup import Cgroups
from vcnode.drivers.hypervisor.qemu.process import read_stat
from vcnode.drivers.hypervisor.qemu.tsc import measure_khz
from vcnode.errors import HypervisorError, NotFoundError, ResourceExhaustedError, UnavailableError
from vcnode.models.vm import Channel, Disk, VmConfig, VmSpec
from vcnode.settings import QemuSettings

pytestmark = pytest.mark.vm

LIMIT_S = 45.0

Node = Callable[[str], Awaitable[QemuHypervisor]]


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    async with Tasks() as made:
        yield made


@pytest.fixture
def make_node(guest_image: Path, short_dir: Path, tasks: Tasks) -> Node:
    """Starts a driver whose guests run a shell script."""

    async def make(script: str, **settings: object) -> QemuHypervisor:
        guest = guests.shell_guest(guest_image, short_dir, script)
        node = QemuHypervisor(QemuSettings(accel="tcg", **settings), guest, state_dir=short_dir, tasks=tasks)
        await node.open()
        return node

    return make


@pytest.fixture
def spec(short_dir: Path) -> VmSpec:
    return guests.make_spec(short_dir)


@contextlib.asynccontextmanager
async def launched(node: QemuHypervisor, spec: VmSpec) -> AsyncIterator[QemuVm]:
    """A VM that is killed afterwards, whatever happened."""
    vm = await node.launch(spec, timeout_s=LIMIT_S)
    try:
        yield vm
    finally:
        await node.kill(vm.record, timeout_s=LIMIT_S)
        await vm.close()


async def console_says(vm: QemuVm, text: str) -> None:
    """Wait until the guest has printed *text* (woken by each read of the console)."""
    printed = asyncio.Event()
    vm._console._on_data = printed.set
    async with asyncio.timeout(LIMIT_S):
        while text not in vm._console.text():
            await printed.wait()
            printed.clear()


def left(spec: VmSpec) -> list[str]:
    """What is in the VM's directory besides logs and share."""
    return sorted({p.name for p in Path(spec.directory).iterdir()} - {"shared", "console.log", "qemu.log"})


async def test_a_guest_that_powers_off_in_time_is_graceful(make_node: Node, spec: VmSpec):
    node = await make_node(guests.POWER_OFF)
    async with launched(node, spec) as vm:
        assert await vm.stop(grace_s=LIMIT_S) == "graceful"
        found = await vm.wait()
        assert (found.expected, found.exit_code, found.reason) == (True, 0, "The guest powered off.")
        assert "bye" in found.console_tail
    assert left(spec) == []


async def test_a_guest_of_its_own_is_booted_with_the_channels_that_its_agent_wants(
    make_node: Node, guest_image: Path, short_dir: Path, spec: VmSpec
):
    """Booted from open files, which may be gone by then; the node's own guest would only idle."""
    node = await make_node(guests.IDLE)
    own = guests.shell_guest(guest_image, short_dir, guests.POWER_OFF)
    with own.kernel.open("rb") as kernel, own.initrd.open("rb") as initrd:
        own.initrd.unlink()
        ports = (Channel(channel_id="ctl", name="a.0"), Channel(channel_id="tty", name="a.1"))
        update = {
            "config": VmConfig(
                kernel=f"/proc/self/fd/{kernel.fileno()}",
                initrd=f"/proc/self/fd/{initrd.fileno()}",
                file_fds=(kernel.fileno(), initrd.fileno()),
            ),
            "channels": ports,
            "share_tag": "mine",
        }
        async with launched(node, spec.model_copy(update=update)) as vm:
            assert [vm.channel(name).is_socket() for name in ("ctl", "tty")] == [True, True]
            found = await asyncio.wait_for(vm.wait(), LIMIT_S)
    assert "bye" in found.console_tail
    assert left(spec) == []


async def test_a_vm_lives_in_a_session_and_a_cgroup_of_its_own(make_node: Node, spec: VmSpec):
    """What ends the node agent's session or group (a terminal, a service manager) must not end VMs."""
    groups = Cgroups.find()
    if not groups.available:
        pytest.skip(f"this host has no usable cgroup v2: {groups.note}")
    group = groups.of(spec.vm_id)
    async with launched(await make_node(guests.IDLE), spec) as vm:
        pid = vm.record.pid or 0
        assert os.getsid(pid) == pid
        assert group.path is not None
        assert (group.path / "cgroup.procs").read_text().split() == [str(pid)]
        usage = group.usage()
        assert usage is not None
        assert usage.cpu.usage_us > 0
        group.kill()
        assert (await asyncio.wait_for(vm.wait(), LIMIT_S)).exit_code == -signal.SIGKILL
    assert not group.path.exists()


async def test_a_kernel_panic_ends_the_vm_and_is_explained(make_node: Node, spec: VmSpec):
    async with launched(await make_node(guests.PANIC), spec) as vm:
        found = await asyncio.wait_for(vm.wait(), LIMIT_S)
    assert not found.expected
    assert found.reason.startswith("The guest's kernel panicked: Attempted to kill init!")
    assert "Kernel panic" in Path(spec.directory, "console.log").read_text()
    assert left(spec) == []


async def test_a_stopped_process_is_killed_all_the_same(make_node: Node, spec: VmSpec):
    """QEMU under SIGSTOP: QMP never answers, and SIGTERM is not delivered."""
    async with launched(await make_node(guests.IDLE), spec) as vm:
        os.kill(vm.record.pid or 0, signal.SIGSTOP)
        assert await asyncio.wait_for(vm.stop(grace_s=0.1), LIMIT_S) == "forced"
        found = await vm.wait()
    assert (found.expected, found.exit_code) == (True, -signal.SIGKILL)
    assert left(spec) == []


async def test_a_forced_stop_quits_before_it_kills(make_node: Node, spec: VmSpec):
    async with launched(await make_node(guests.IDLE), spec) as vm:
        assert await vm.stop(grace_s=0.01) == "forced"
        found = await vm.wait()
    assert (found.exit_code, found.reason) == (0, "QEMU was told to quit.")


async def test_a_cancelled_stop_finishes_the_kill(make_node: Node, spec: VmSpec):
    async with launched(await make_node(guests.IDLE), spec) as vm:
        stopping = asyncio.ensure_future(vm.stop(grace_s=3600))
        await asyncio.wait({stopping}, timeout=0.05)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(stopping, LIMIT_S)
        assert read_stat(vm.record.pid or 0) is None
    assert left(spec) == []


@pytest.mark.parametrize("content", [b"", b"not a kernel" * 1000], ids=["empty", "garbage"])
async def test_a_broken_kernel_fails_the_launch_with_nothing_left(
    content: bytes, short_dir: Path, spec: VmSpec, tasks: Tasks, caplog: pytest.LogCaptureFixture
):
    kernel, initrd = short_dir / "vmlinux", short_dir / "initrd"
    kernel.write_bytes(content)
    initrd.write_bytes(b"")
    node = QemuHypervisor(QemuSettings(accel="tcg"), Guest(kernel, initrd), state_dir=short_dir, tasks=tasks)
    await node.open()
    with caplog.at_level(logging.ERROR), pytest.raises(HypervisorError, match="ended with code 1") as caught:
        await node.launch(spec, timeout_s=LIMIT_S)
    assert str(short_dir) not in caught.value.message
    assert "-kernel" in caplog.text
    assert "\nqemu: " in caplog.text
    assert left(spec) == []
    assert tasks.count == 0


async def test_a_host_without_memory_for_a_vm_says_so_with_nothing_left(
    make_node: Node, spec: VmSpec, tasks: Tasks
):
    node = await make_node(guests.IDLE)
    more_than_there_are_addresses = spec.model_copy(update={"mem_size_mib": 200 << 20})
    with pytest.raises(ResourceExhaustedError, match="no memory left"):
        await node.launch(more_than_there_are_addresses, timeout_s=LIMIT_S)
    assert left(spec) == []


async def test_a_missing_guest_image_says_how_to_make_one(short_dir: Path, tasks: Tasks):
    node = QemuHypervisor(
        QemuSettings(accel="tcg"),
        Guest(short_dir / "vmlinux", short_dir / "initrd"),
        state_dir=short_dir,
        tasks=tasks,
    )
    with pytest.raises(HypervisorError, match="vcnode guest build"):
        await node.open()


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.05, 0.2])
async def test_a_cancelled_launch_leaves_nothing(make_node: Node, spec: VmSpec, tasks: Tasks, after_s: float):
    node = await make_node(guests.IDLE)
    launching = asyncio.ensure_future(node.launch(spec, timeout_s=LIMIT_S))
    await asyncio.wait({launching}, timeout=after_s)
    launching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        vm = await launching
        await vm.stop(grace_s=0)  # it was quicker
    assert await node.kill(_early(spec), timeout_s=LIMIT_S) is False
    assert left(spec) == []


async def test_a_launch_that_is_too_slow_leaves_nothing(make_node: Node, spec: VmSpec):
    node = await make_node(guests.IDLE)
    with pytest.raises(HypervisorError, match="did not answer within"):
        await node.launch(spec, timeout_s=0.005)
    assert await node.kill(_early(spec), timeout_s=LIMIT_S) is False
    assert left(spec) == []


async def test_a_path_too_long_for_sockets_is_refused(make_node: Node, short_dir: Path):
    node = await make_node(guests.IDLE)
    with pytest.raises(HypervisorError, match="run_dir"):
        await node.launch(guests.make_spec(short_dir / ("x" * 90)), timeout_s=LIMIT_S)


async def test_a_directory_holds_one_vm(make_node: Node, spec: VmSpec):
    node = await make_node(guests.IDLE)
    async with launched(node, spec) as vm:
        with pytest.raises(HypervisorError, match="belongs to another VM"):
            await node.launch(spec, timeout_s=LIMIT_S)
        await vm.close()
        assert await node.recover(vm.record, timeout_s=LIMIT_S) is not None  # its sockets were left alone


async def test_the_guest_is_told_the_rate_of_its_counter(make_node: Node, spec: VmSpec):
    """Without it a guest under TCG hangs at boot on a busy host, before its console is up (see tsc.py)."""
    if measure_khz() is None:
        pytest.skip("this host's counter cannot be measured")
    async with launched(await make_node(guests.IDLE), spec) as vm:
        assert b" tsc_early_khz=" in Path(f"/proc/{vm.record.pid}/cmdline").read_bytes()


async def test_a_missing_disk_file_is_not_found(make_node: Node, spec: VmSpec, short_dir: Path):
    async with launched(await make_node(guests.IDLE), spec) as vm:
        with pytest.raises(NotFoundError):
            await vm.attach_disk(Disk(disk_id="d-1", path=str(short_dir / "none")), timeout_s=LIMIT_S)


async def test_an_attach_that_qemu_does_not_answer_is_undone(make_node: Node, spec: VmSpec, short_dir: Path):
    (short_dir / "disk").write_bytes(bytes(4096))
    disk = Disk(disk_id="d-1", path=str(short_dir / "disk"))
    async with launched(await make_node(guests.IDLE), spec) as vm:
        os.kill(vm.record.pid or 0, signal.SIGSTOP)
        attaching = asyncio.ensure_future(vm.attach_disk(disk, timeout_s=0.1))
        await asyncio.wait({attaching}, timeout=0.5)
        os.kill(vm.record.pid or 0, signal.SIGCONT)
        with pytest.raises(HypervisorError, match="attach_disk"):
            await attaching
        await vm.attach_disk(disk, timeout_s=LIMIT_S)  # had it stayed, this would be refused


async def test_a_reused_pid_is_not_taken_for_the_vm(make_node: Node, spec: VmSpec):
    node = await make_node(guests.IDLE)
    async with launched(node, spec) as vm:
        later = vm.record.model_copy(update={"pid_start_ticks": (vm.record.pid_start_ticks or 0) + 1})
        ours = vm.record.model_copy(
            update={"pid": os.getpid(), "pid_start_ticks": read_stat(os.getpid()).start_ticks}
        )
        for record in (later, ours):
            assert await node.recover(record, timeout_s=LIMIT_S) is None
            assert await node.kill(record, timeout_s=LIMIT_S) is False


async def test_recover_of_a_vm_that_does_not_answer_fails_and_kill_ends_it(make_node: Node, spec: VmSpec):
    node = await make_node(guests.IDLE)
    async with launched(node, spec) as vm:
        await vm.close()
        os.kill(vm.record.pid or 0, signal.SIGSTOP)
        with pytest.raises(HypervisorError, match="did not answer within"):
            await node.recover(vm.record, timeout_s=0.2)
        assert await node.kill(vm.record, timeout_s=LIMIT_S)
    assert left(spec) == []


async def test_waiting_on_a_closed_handle_ends(make_node: Node, spec: VmSpec):
    async with launched(await make_node(guests.IDLE), spec) as vm:
        waiting = asyncio.ensure_future(vm.wait())
        await asyncio.sleep(0)
        await vm.close()
        with pytest.raises(UnavailableError):
            await waiting


async def test_the_console_is_kept_while_the_node_is_away(make_node: Node, spec: VmSpec):
    node = await make_node("echo ready; sleep 1; echo while you were away; exec sleep 1000000")
    async with launched(node, spec) as vm:
        await console_says(vm, "ready")
        await vm.close()
        again = await node.recover(vm.record, timeout_s=LIMIT_S)
        assert again is not None
        await console_says(again, "while you were away")
        assert "ready" in again._console.text()
        await again.close()


async def test_a_flooding_console_is_bounded_and_stops_nobody(make_node: Node, spec: VmSpec):
    limit = 16 * 1024
    node = await make_node(guests.FLOOD, console_max_bytes=limit)
    async with launched(node, spec) as vm:
        old = Path(spec.directory, "console.log.1")
        rotated = asyncio.Event()
        vm._console._on_data = lambda: rotated.set() if old.exists() else None
        await asyncio.wait_for(rotated.wait(), LIMIT_S)
        assert old.stat().st_size <= limit
        assert Path(spec.directory, "console.log").stat().st_size <= limit
        # Nobody reads from here on: the pipe fills, and QEMU must answer all the same.
        vm._console.close()
        for _ in range(20):
            await vm.pause(timeout_s=LIMIT_S)
            await vm.resume(timeout_s=LIMIT_S)


async def test_many_launches_leave_nothing(make_node: Node, short_dir: Path, tasks: Tasks):
    node = await make_node(guests.IDLE)
    before = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    for _ in range(20):
        spec = guests.make_spec(short_dir)
        vm = await node.launch(spec, timeout_s=LIMIT_S)
        assert await vm.stop(grace_s=0) == "forced"
        assert read_stat(vm.record.pid or 0) is None
        assert left(spec) == []
    assert (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())) == before
    assert tasks.count == 0


def _early(spec: VmSpec):
    """A record as it is written down before the launch."""
    from vcnode.models.vm import VmRecord

    return VmRecord(vm_id=spec.vm_id, uuid=spec.uuid, directory=spec.directory, type="qemu")
