"""Starts processes: the agent's side of `forker`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

from vcnode.guest.agent import forker, orders, syscalls
from vcnode.guest.agent.entries import AHEAD
from vcnode.guest.agent.failures import CODES, INTERNAL, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vcnode.guest.agent.entries import Entry
    from vcnode.guest.agent.process import Plan

    Order = tuple[
        tuple[bytes, ...],  # args
        dict[bytes, bytes],  # environment
        tuple[bytes, ...],  # files to try
        str,  # working directory
        tuple[tuple[int, int, int], ...],  # resource limits
        tuple[int, ...],  # capabilities to drop
        bool,  # no_new_privs
        tuple[int, int, tuple[int, ...]],  # user, group, supplementary groups
        tuple[int, int] | None,  # rows and columns of a terminal
        tuple[str, str, int] | None,  # instead of a program: arguments of `copying.run`
        str,  # kind of entry
        tuple[Any, ...],  # fields of the entry
    ]

_MAX_STATUS_BYTES = 4096
_READY_S = 5.0
"""Most that a process may take to stand ready: some tens of milliseconds, and nobody is served meanwhile."""


class Spawned:
    """A child of the agent, from the moment of its fork."""

    __slots__ = ("pid", "pidfd", "status_fd")

    def __init__(self, pid: int, pidfd: int, status_fd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        """Readable when it has ended; refers to this very process for ever. The caller closes it."""
        self.status_fd = status_fd
        """Non-blocking; see `read_status`. The caller closes it."""


class Spawner:
    """Makes processes. There is one in the agent.

    Args:
        guard_oom: Whether to exempt the agent from the OOM killer; needs CAP_SYS_RESOURCE.
    """

    def __init__(self, *, guard_oom: bool) -> None:
        # An ignored signal stays ignored after execve, a handled one does not: Python ignores these two.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, _ignore)
        if guard_oom:
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("-1000")
        self._ahead: _Ahead | None = None
        self._sock, theirs = socket.socketpair()
        self.forker_pid = os.fork()
        if self.forker_pid == 0:
            try:
                forker.serve(theirs, guard_oom=guard_oom)
            except BaseException:
                # The agent finds the line cut, and ends too.
                sys.__excepthook__(*sys.exc_info())
            finally:
                os._exit(1)
        theirs.close()

    def spawn(self, plan: Plan, stdio: tuple[int, int, int], entry: Entry) -> Spawned:
        """Start a program.

        Args:
            plan: What to run.
            stdio: Descriptors of the child's stdin, stdout and stderr; they stay open in the caller.
            entry: Where to run it.

        Raises:
            Failure: No process could be made, nothing is left.
        """
        status_read, status_write = os.pipe()
        try:
            os.set_blocking(status_read, False)
            fds = (*stdio, status_write, *entry.fds)
            pid, pidfd = self._use_ahead(plan, fds, entry) or self._fork(_order(plan, entry), fds)
        except OSError as exc:
            os.close(status_read)
            raise entry.refusal(exc) from exc
        finally:
            os.close(status_write)
        return Spawned(pid, pidfd, status_read)

    def fork_ahead(self) -> None:
        """Have a process stand ready for the next container's start, unless one does.

        Raises nothing: without one, a start takes longer.
        """
        if self._ahead is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                ahead = _Ahead(*self._fork((AHEAD, ()), (theirs.fileno(),)), ours)
            except OSError:
                ours.close()
                return
        # Not before it is ready: what a template is saved with half done, each of its clones has to finish.
        if ahead.is_ready():
            self._ahead = ahead
        else:
            ahead.end()

    def _use_ahead(self, plan: Plan, fds: tuple[int, ...], entry: Entry) -> tuple[int, int] | None:
        """Give the order to the process that stands ready, if one does that fits. Gives pid and pidfd."""
        if self._ahead is None or not entry.fits_ahead:
            return None
        ahead, self._ahead = self._ahead, None
        try:
            # The root came after its mount namespace.
            root_fd = syscalls.open_tree(entry.root)
            try:
                orders.send(ahead.sock, _order(plan, entry), (*fds, root_fd))
            finally:
                os.close(root_fd)
        except OSError:
            ahead.end()
            return None
        ahead.sock.close()
        return ahead.pid, ahead.pidfd

    def _fork(self, order: tuple[Any, ...], fds: tuple[int, ...]) -> tuple[int, int]:
        """Have the forker fork; returns the pid of the agent's new child, and a pidfd."""
        orders.send(self._sock, order, fds)
        answer = self._sock.recv(forker.ANSWER.size, socket.MSG_WAITALL)
        if len(answer) < forker.ANSWER.size:
            raise RuntimeError("The forker has died.")
        pid, number = forker.ANSWER.unpack(answer)
        if number:
            raise OSError(number, os.strerror(number))
        return int(pid), _open_pidfd(pid)


class _Ahead:
    """A process that stands ready; see `child.stand_ready`."""

    __slots__ = ("pid", "pidfd", "sock")

    def __init__(self, pid: int, pidfd: int, sock: socket.socket) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.sock = sock

    def is_ready(self) -> bool:
        """Wait until it says that it is; False when it does not."""
        self.sock.settimeout(_READY_S)
        try:
            return self.sock.recv(1) != b""
        except OSError:
            return False
        finally:
            self.sock.settimeout(None)

    def end(self) -> None:
        """Nobody needs it."""
        self.sock.close()
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def _order(plan: Plan, entry: Entry) -> Order:
    spec, who = plan.spec, plan.identity
    return (
        spec.args,
        plan.env,
        plan.files,
        spec.workdir,
        spec.rlimits,
        plan.dropped_capabilities,
        spec.no_new_privileges,
        (who.uid, who.gid, who.groups),
        plan.terminal,
        plan.copy,
        entry.kind,
        entry.fields,
    )


def _open_pidfd(pid: int) -> int:
    """A pidfd for a fresh child; without one nobody would learn of its end, so then it is ended here."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _ignore(_number: int, _frame: object) -> None:
    """The failing call raises OSError besides."""


def read_status(fd: int) -> Failure | bool:
    """What the status pipe says: True, it runs; False, nothing yet; or why it does not run."""
    try:
        content = os.read(fd, _MAX_STATUS_BYTES)
    except BlockingIOError:
        return False
    if not content:
        return True
    # Written in one piece by our own code, before the program had a chance; checked all the same.
    try:
        code, message = json.loads(content)
    except ValueError:
        code, message = INTERNAL, "A process could not be set up."
    return Failure(code if code in CODES else INTERNAL, str(message))
