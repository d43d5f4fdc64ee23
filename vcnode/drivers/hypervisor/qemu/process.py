"""QEMU's process: started in a session of its own, known by pid, start time and ``-uuid``, held by a pidfd.

A pidfd names one process for ever: it cannot come to mean another one when the pid is used again, it becomes
readable at the moment the process ends, and it works alike for our children and for a QEMU that an earlier
node agent started.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from vcnode.drivers import namespaces
from vcnode.drivers.exhaustion import exhausted
from vcnode.errors import HypervisorError

log = logging.getLogger(__name__)

PR_SET_THP_DISABLE = 41
"""Source: linux/prctl.h. A kernel without huge pages refuses it, and needs it as little."""
_libc = ctypes.CDLL(None)

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""All of QEMU's environment: what the node agent was given (secrets, perhaps) is none of its business."""
VM_DIR = "VCNODE_VM_DIR"
"""Besides, the variable that has the VM's directory."""

NAME_PREFIX = "vcnode-"
"""Of the name that QEMU is given; the VM's id follows."""


class Stat(NamedTuple):
    """What tells a process from another one with the same pid."""

    start_ticks: int
    """Start time in clock ticks since boot."""
    zombie: bool
    """Whether it has ended and only waits to be reaped."""


def read_stat(pid: int) -> Stat | None:
    """Read a process's start time; None when there is no such process.

    Source: proc_pid_stat(5), fields 3 (state) and 22; the name in field 2 may hold spaces and parentheses.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(int(fields[19]), fields[0] in "ZX")


def has_uuid(pid: int, uuid: str) -> bool:
    """Whether the command line of process *pid* holds ``-uuid`` with *uuid*."""
    try:
        args = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(a == b"-uuid" and b == uuid.encode() for a, b in pairwise(args))


def find(uuid: str) -> tuple[int, int] | None:
    """Search all processes for the one with ``-uuid`` *uuid*; gives its pid and start time.

    For a node agent that was killed after it had started QEMU and before it could write down the pid.
    """
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and has_uuid(int(entry), uuid):
            stat = read_stat(int(entry))
            if stat is not None:
                return int(entry), stat.start_ticks
    return None


class Named(NamedTuple):
    """A QEMU that was found by its name."""

    pid: int
    start_ticks: int
    vm_id: str
    uuid: str


def named(mark: str) -> list[Named]:
    """All QEMUs whose VM's id begins with *mark*, as ``-name guest=vcnode-<vm_id>`` says it.

    Of this user; of all users for root.
    """
    found = []
    prefix = f"guest={NAME_PREFIX}"
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (args := _arguments(int(entry))) is not None:
            options = dict(pairwise(args))
            name, uuid = options.get("-name", ""), options.get("-uuid", "")
            vm_id = name.removeprefix(prefix)
            if name.startswith(prefix) and vm_id.startswith(mark) and uuid:
                stat = read_stat(int(entry))
                if stat is not None and not stat.zombie:
                    found.append(Named(int(entry), stat.start_ticks, vm_id, uuid))
    return sorted(found)


def _arguments(pid: int) -> list[str] | None:
    """The command line of a process of this user, of any for root; None when there is none any more."""
    directory = Path(f"/proc/{pid}")
    try:
        if os.geteuid() not in (0, directory.stat().st_uid):
            return None
        return (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


class Process:
    """A QEMU process, our child or not. Made by `spawn` or `adopt`; `release` lets go of it."""

    def __init__(self, pid: int, ticks: int, pidfd: int) -> None:
        self.pid = pid
        self.start_ticks = ticks
        self._pidfd: int | None = pidfd
        self._ended = asyncio.Event()
        self._exit_code: int | None = None
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as the event loop has seen."""
        return not self._ended.is_set()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing if it has ended."""
        if self._pidfd is not None and self.alive:
            with contextlib.suppress(ProcessLookupError):  # it ended just now; the pidfd says so soon
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int | None:
        """Wait for its end; the exit code, negative for a signal, None if it was not our child."""
        await self._ended.wait()
        return self._exit_code

    async def ended_within(self, seconds: float) -> bool:
        """Wait for its end, at most *seconds*; whether it has ended."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return not self.alive
        return True

    def release(self) -> None:
        """Stop watching; the process goes on. Idempotent."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _on_end(self) -> None:
        if self._pidfd is None:  # the reader is removed together with the descriptor
            return
        self._exit_code = reap(self._pidfd)
        self.release()
        self._ended.set()


def reap(pidfd: int) -> int | None:
    """Collect an ended child; its exit code as in `Process.wait`."""
    try:
        # Linux: "waitid(P_PIDFD)" since 5.4, the kernel that also brought pidfd_open.
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """Let what is started meanwhile have no huge pages.

    For translated code QEMU asks for them, and gets them for heap and stacks; a VM that is idle has touched a
    part of each, some 3 MiB less. Source: prctl(2), PR_SET_THP_DISABLE, inherited by fork and execve.
    """
    _libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def spawn(
    argv: Sequence[str],
    *,
    stderr_fd: int,
    fds: Sequence[int],
    directory: Path,
    netns_path: str | None = None,
    huge_pages: bool = True,
) -> Process:
    """Start QEMU in a session of its own, with nothing of ours but *stderr_fd* and *fds*.

    It shares no pipe, terminal or process group with the node agent, so it outlives it. Blocks for the few
    milliseconds that vfork and exec take.

    Args:
        argv: The command line.
        stderr_fd: Takes its standard output and error.
        fds: Descriptors to inherit under their numbers.
        directory: Its working directory: where a core dump would go. Also in its environment, as `VM_DIR`:
            a program may leave the one, and keeps the other.
        netns_path: Network namespace that it is born in; None: ours.
        huge_pages: Whether it may have them: see `small_pages`.

    Raises:
        HypervisorError: The program could not be executed.
        ResourceExhaustedError: The host, or the node agent's limits, have no room for it.
        NetworkError: There is no such namespace.
    """

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stderr_fd,
            stderr=stderr_fd,
            pass_fds=fds,
            cwd=directory,
            env={**ENVIRONMENT, VM_DIR: str(directory)},
            start_new_session=True,
        )

    try:
        with contextlib.nullcontext() if huge_pages else small_pages():
            child = start() if netns_path is None else namespaces.call(netns_path, start)
    except (OSError, ValueError) as exc:
        short = exhausted(exc) if isinstance(exc, OSError) else None
        raise short or HypervisorError(f"{argv[0]} could not be executed.") from exc
    try:
        held = _hold_child(child.pid)
    except OSError as exc:
        child.kill()
        child.wait()
        raise exhausted(exc) or HypervisorError(f"Process {child.pid} cannot be held.") from exc
    # From here on the pidfd alone watches and reaps it. Popen must not: it would complain about a child that
    # is let go alive, and reap behind our back.
    child.returncode = 0
    return held


def _hold_child(pid: int) -> Process:
    """Hold a child of ours. Raises OSError: it lives on, held by nobody."""
    pidfd = os.pidfd_open(pid)
    try:
        stat = read_stat(pid)
        if stat is None:  # cannot be: nobody but us reaps it, and we have not
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has no entry in /proc")
        return Process(pid, stat.start_ticks, pidfd)
    except BaseException:
        os.close(pidfd)
        raise


def adopt(pid: int, ticks: int, uuid: str | None = None) -> Process | None:
    """Hold the process that *pid*, start time and *uuid* describe; None when that very process is gone.

    *uuid* None: a process that is no QEMU.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as exc:
        raise exhausted(exc) or HypervisorError(f"Process {pid} cannot be held.") from exc
    keep = False
    try:
        # The pidfd came first: what is read now is either of the process that it names, or of none.
        stat = read_stat(pid)
        if stat is not None and stat.start_ticks == ticks:
            keep = not stat.zombie and (uuid is None or has_uuid(pid, uuid))
            if stat.zombie:
                reap(pidfd)  # a child of ours whose handle was closed before it ended
    except OSError as exc:
        raise exhausted(exc) or HypervisorError(f"Process {pid} cannot be looked at.") from exc
    finally:
        if not keep:
            os.close(pidfd)
    return Process(pid, ticks, pidfd) if keep else None
