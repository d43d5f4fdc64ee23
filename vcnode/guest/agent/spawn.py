"""From a `process.Plan` to a running program.

`spawn` forks the agent; the child goes through these steps and becomes the program::

    close all descriptors but its own  ->  new session  ->  enter (the namespaces and root of a container)
        ->  working directory  ->  limits  ->  capabilities, user, no_new_privs  ->  execve

A step that fails is told to the agent through the status pipe, which execve closes: end of file means that
the program runs, or could not be executed, in which case the child itself says so on its stderr and exits
with 126 or 127 as a shell would.

Two things of the agent would be inherited and are seen to before the fork: ignored signals (`set_up` gives
those that Python ignores a handler, which execve resets), and the exemption from the OOM killer.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat

from vcnode.guest.agent import limits, syscalls
from vcnode.guest.agent.failures import CODES, INTERNAL, Failure, printable
from vcnode.guest.agent.params import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from vcnode.guest.agent.process import Plan

NOT_EXECUTABLE = 126
NOT_FOUND = 127
_SETUP_FAILED = 125  # exit code that nobody sees: the status pipe has told more
_MAX_STATUS_BYTES = 4096


class Spawned:
    """A child of the agent, from the moment of its fork."""

    __slots__ = ("pid", "pidfd", "status_fd")

    def __init__(self, pid: int, pidfd: int, status_fd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        """Readable when it has ended; refers to this very process for ever. The caller closes it."""
        self.status_fd = status_fd
        """Non-blocking; see `read_status`. The caller closes it."""


class Entry:
    """How a child gets from the guest's own namespaces to where it is to run; this one stays in the guest.

    ``pid_namespace`` holds a descriptor to join, or NEW or SAME; it is applied by the parent around the fork,
    because a process never changes its own pid namespace.
    """

    NEW, SAME = -1, -2
    pid_namespace = SAME
    keep_fds: tuple[int, ...] = ()
    """Descriptors that `enter` uses; all others are closed before."""
    root = "/"
    """The root directory, as the agent sees it."""
    hostname = ""
    """For the environment."""

    def enter(self) -> None:
        """Runs in the child, as root of the guest; raises OSError or Failure."""
        os.chdir("/")

    def refusal(self, exc: OSError) -> Failure:
        """What it means that the kernel refused to make a process for this entry."""
        return Failure.of(exc, "start a process")


class Spawner:
    """Makes processes. There is one in the agent.

    Args:
        guard_oom: Whether to exempt the agent from the OOM killer, needs CAP_SYS_RESOURCE.
    """

    def __init__(self, *, guard_oom: bool) -> None:
        self._own_pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._oom_score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        self._guard_oom = guard_oom
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, _ignore)
        self._exempt(True)

    def _exempt(self, exempt: bool) -> None:
        if self._guard_oom:
            os.pwrite(self._oom_score, b"-1000" if exempt else b"0", 0)

    def spawn(self, plan: Plan, stdio: tuple[int, int, int], entry: Entry) -> Spawned:
        """Start a program.

        Args:
            plan: What to run.
            stdio: Descriptors of the child's stdin, stdout and stderr; they stay open in the caller.
            entry: Where to run it.

        Raises:
            Failure: ``internal``; no process could be made, nothing is left.
        """
        status_read, status_write = os.pipe()
        try:
            os.set_blocking(status_read, False)
            kept = sorted({status_write, *entry.keep_fds})
            pid = self._fork_into(entry)
            if pid == 0:
                _child(plan, stdio, entry, kept, status_write)
        except OSError as exc:
            os.close(status_read)
            raise entry.refusal(exc) from exc
        finally:
            os.close(status_write)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as exc:
            # Without a pidfd nobody would learn of its end.
            os.close(status_read)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Failure.of(exc, "start a process") from exc
        return Spawned(pid, pidfd, status_read)

    def _fork_into(self, entry: Entry) -> int:
        if entry.pid_namespace == Entry.NEW:
            syscalls.unshare(syscalls.CLONE_NEWPID)
        elif entry.pid_namespace != Entry.SAME:
            syscalls.setns(entry.pid_namespace, syscalls.CLONE_NEWPID)
        pid = -1
        try:
            self._exempt(False)
            pid = os.fork()
        finally:
            if pid != 0:
                self._exempt(True)
                if entry.pid_namespace != Entry.SAME:
                    syscalls.setns(self._own_pidns, syscalls.CLONE_NEWPID)
        return pid


def _ignore(_number: int, _frame: object) -> None:
    """A handler instead of SIG_IGN, for execve resets handlers only. The failing call raises OSError."""


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


# -- in the child ----------------------------------------------------------------------------------


def _child(
    plan: Plan, stdio: tuple[int, int, int], entry: Entry, kept: list[int], status_fd: int
) -> NoReturn:
    """Never returns, whatever happens: the agent's loop is below on the stack."""
    try:
        _become(plan, stdio, entry, kept)
    except Failure as exc:
        _tell(status_fd, exc)
    except OSError as exc:
        _tell(status_fd, Failure.of(exc, "set up the process"))
    except BaseException as exc:  # also KeyboardInterrupt: nothing may unwind into the loop
        _tell(status_fd, Failure(INTERNAL, f"The process could not be set up: {type(exc).__name__}: {exc}"))
    finally:
        os._exit(_SETUP_FAILED)


def _tell(status_fd: int, failure: Failure) -> None:
    os.write(status_fd, json.dumps([failure.code, failure.message[:1000]]).encode())


def _become(plan: Plan, stdio: tuple[int, int, int], entry: Entry, kept: list[int]) -> NoReturn:
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
    # Nothing of the agent's may be within reach of the container's files (CVE-2024-21626).
    lowest = 3
    for fd in kept:
        os.closerange(lowest, fd)
        lowest = fd + 1
    os.closerange(lowest, limits.AGENT_NOFILE)
    os.setsid()
    entry.enter()
    if plan.spec.workdir != "/":
        _enter_workdir(plan.spec.workdir)
    limits.apply(plan.spec.rlimits)
    _drop_privileges(plan)
    _execute(plan)


def _enter_workdir(path: str) -> None:
    try:
        try:
            os.chdir(path)
        except FileNotFoundError:
            os.makedirs(path, 0o755, exist_ok=True)
            os.chdir(path)
    except OSError as exc:
        raise invalid("process.workdir", f"{printable(path)!r} cannot be used: {exc.strerror}") from exc


def _drop_privileges(plan: Plan) -> None:
    """Give up what the program is not to have.

    The bounding set is all that needs to be cut: the agent's inheritable and ambient sets are empty, so
    execve leaves root with exactly the bounding set, and any other user with nothing; capabilities(7),
    Transformation of capabilities during execve().
    """
    identity = plan.identity
    if identity.uid:
        _give_pipes_to(identity.uid)
    for number in plan.dropped_capabilities:
        syscalls.drop_from_bounding_set(number)
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    if plan.spec.no_new_privileges:
        syscalls.set_no_new_privileges()


def _give_pipes_to(uid: int) -> None:
    """Let the user open /dev/stdout and the like again; runc does the same (fixStdioPermissions)."""
    for fd in (0, 1, 2):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, uid, -1)


def _execute(plan: Plan) -> NoReturn:
    problem: OSError | None = None
    for file in plan.files:
        try:
            os.execve(file, plan.args, plan.env)  # noqa: S606 (what else)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            # As shells do: what is there but cannot be executed is remembered, the search goes on.
            problem = problem or exc
            if exc.errno != errno.EACCES:
                break
    text = problem.strerror if problem is not None else "not found"
    os.write(2, f"vcnode: {printable(plan.args[0])}: {text}\n".encode())
    os._exit(NOT_FOUND if problem is None else NOT_EXECUTABLE)
