"""vcnode.drivers.hypervisor.qemu.process: processes by pidfd, on a shell instead of QEMU."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import process as processes
from vcnode.drivers.hypervisor.qemu.process import Process, adopt, find, read_stat, reap, spawn
from vcnode.errors import HypervisorError, ResourceExhaustedError

UUID = "11111111-2222-3333-4444-555555555555"


WAITING = "read line < fifo"
"""A shell that waits by itself for what never comes, so that killing it leaves no child of its own."""


@pytest.fixture
def output(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "output").open("wb") as file:
        yield file.fileno()


def start(
    script: str, output: int, tmp_path: Path, *, vm_uuid: str = UUID, fds: tuple[int, ...] = ()
) -> Process:
    argv = ["/bin/sh", "-c", script, "-uuid", vm_uuid]
    return spawn(argv, stderr_fd=output, fds=fds, directory=tmp_path)


def child(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv)


def until_ended(pid: int) -> None:
    """Wait for a child's end and leave it a zombie."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def stranger() -> int:
    """A process whose parent is gone."""
    script = "sleep 100 >/dev/null & echo $!"
    return int(subprocess.run(["/bin/sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9)])
async def test_the_end_is_noticed_with_its_code(script: str, code: int, output: int, tmp_path: Path):
    process = start(script, output, tmp_path)
    assert await asyncio.wait_for(process.wait(), 10) == code
    assert not process.alive
    assert read_stat(process.pid) is None  # reaped


async def test_it_gets_a_session_and_nothing_of_ours(output: int, tmp_path: Path):
    os.environ["VCNODE_SECRET"] = "secret"
    ours, theirs = os.pipe()
    try:
        os.set_inheritable(ours, True)
        process = start(
            'echo $(ls /proc/self/fd); env; cut -d" " -f6 /proc/$$/stat; pwd',
            output,
            tmp_path,
            fds=(theirs,),
        )
        await asyncio.wait_for(process.wait(), 10)
    finally:
        os.close(ours)
        os.close(theirs)
        del os.environ["VCNODE_SECRET"]
    fds, *rest = (tmp_path / "output").read_text().splitlines()
    assert set(fds.split()) <= {"0", "1", "2", "3", str(theirs)}  # 3: what ls reads
    assert str(theirs) in fds.split()
    assert "secret" not in "\n".join(rest)
    assert rest[-2] == str(process.pid)  # leads its session
    assert rest[-1] == str(tmp_path)


async def test_a_program_that_is_missing_says_so(output: int, tmp_path: Path):
    with pytest.raises(HypervisorError, match="/no/qemu could not be executed"):
        spawn(["/no/qemu"], stderr_fd=output, fds=(), directory=tmp_path)


async def test_it_can_be_adopted_again_after_it_was_let_go(output: int, tmp_path: Path):
    process = start(f"echo up; {WAITING}", output, tmp_path)
    # A descriptor that execve closes, by which its end is known, is closed before /proc has the command line.
    while not (tmp_path / "output").read_bytes():  # noqa: ASYNC110 -- it is a file
        await asyncio.sleep(0.01)
    process.release()
    process.release()
    again = adopt(process.pid, process.start_ticks, UUID)
    assert again is not None
    again.signal(signal.SIGKILL)
    assert await asyncio.wait_for(again.wait(), 10) == -9
    again.signal(signal.SIGKILL)  # harmless


async def test_another_process_is_not_adopted(output: int, tmp_path: Path):
    process = start(WAITING, output, tmp_path)
    try:
        assert adopt(process.pid, process.start_ticks + 1, UUID) is None
        assert adopt(process.pid, process.start_ticks, str(uuid.uuid4())) is None
        assert process.alive
    finally:
        process.signal(signal.SIGKILL)
        await process.wait()
    assert adopt(process.pid, process.start_ticks, UUID) is None


async def test_a_child_that_ended_unwatched_is_reaped_and_not_adopted(output: int, tmp_path: Path):
    process = start("exit 0", output, tmp_path)
    process.release()
    until_ended(process.pid)
    assert adopt(process.pid, process.start_ticks, UUID) is None
    assert read_stat(process.pid) is None


async def test_a_zombie_of_somebody_else_with_a_reused_pid_is_left_alone():
    other = child("/bin/true")
    until_ended(other.pid)
    assert adopt(other.pid, 1, UUID) is None
    assert other.wait() == 0


async def test_the_exit_code_of_a_stranger_is_not_known():
    """A QEMU that an earlier node agent started: its end is seen, its code went to somebody else."""
    pid = stranger()
    pidfd = os.pidfd_open(pid)
    process = Process(pid, 0, pidfd)
    process.signal(signal.SIGKILL)
    assert await asyncio.wait_for(process.wait(), 10) is None


async def test_ended_within_is_bounded(output: int, tmp_path: Path):
    process = start(WAITING, output, tmp_path)
    assert not await process.ended_within(0.01)
    process.signal(signal.SIGKILL)
    assert await process.ended_within(10)


async def test_a_process_is_found_by_its_uuid(output: int, tmp_path: Path):
    name = str(uuid.uuid4())
    process = start(WAITING, output, tmp_path, vm_uuid=name)
    # The start is over a moment before the command line can be read: wait until the program runs.
    fifo = await asyncio.to_thread(os.open, tmp_path / "fifo", os.O_WRONLY)
    try:
        assert find(name) == (process.pid, process.start_ticks)
    finally:
        process.signal(signal.SIGKILL)
        await process.wait()
        os.close(fifo)
    assert find(name) is None


def test_the_start_time_is_read_past_an_odd_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    line = "7 (a) b (c)) S " + " ".join(str(n) for n in range(4, 53))
    (tmp_path / "stat").write_text(line)
    monkeypatch.setattr(processes, "Path", lambda _: tmp_path / "stat")
    assert read_stat(7) == (22, False)


def test_reap_of_a_live_child_does_not_wait():
    sleeping = child("/bin/sleep", "100")
    pidfd = os.pidfd_open(sleeping.pid)
    try:
        assert reap(pidfd) is None
    finally:
        os.close(pidfd)
        sleeping.kill()
        sleeping.wait()


@pytest.mark.parametrize("huge_pages", [True, False])
async def test_huge_pages_are_kept_from_the_child_and_not_from_us(
    huge_pages: bool, output: int, tmp_path: Path
):
    argv = ["/bin/sh", "-c", "grep THP_enabled /proc/self/status", "-uuid", UUID]
    process = spawn(argv, stderr_fd=output, fds=(), directory=tmp_path, huge_pages=huge_pages)
    assert await asyncio.wait_for(process.wait(), 10) == 0
    assert (tmp_path / "output").read_text().split()[-1] == str(int(huge_pages))
    assert "THP_enabled:\t1" in Path("/proc/self/status").read_text()


@pytest.mark.parametrize("look", ["read_stat", "has_uuid"])
def test_a_process_that_cannot_be_looked_at_costs_no_descriptor(
    look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor that holds it may be the last one that there was."""

    def short(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    stat = read_stat(os.getpid())
    assert stat is not None
    monkeypatch.setattr(processes, look, short)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceExhaustedError):
        adopt(os.getpid(), stat.start_ticks, UUID)
    assert set(os.listdir("/proc/self/fd")) == before
