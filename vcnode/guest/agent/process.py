"""From a request's ``process`` to a running program.

``spawn`` forks the agent; the child goes through these steps and becomes the program::

    close all descriptors but its own  ->  new session  ->  enter (the namespaces and root of a container)
        ->  user, limits, working directory  ->  capabilities, no_new_privs  ->  signals  ->  execve

A step that fails is told to the agent through the status pipe, which execve closes: end of file means that
the program runs, or could not be executed, in which case the child itself says so on its stderr and exits
with 126 or 127 as a shell would.
"""

from __future__ import annotations

import errno
import json
import os
import signal

from vcnode.guest.agent import capabilities, limits, syscalls, users
from vcnode.guest.agent.failures import CODES, INTERNAL, Failure, printable
from vcnode.guest.agent.params import Params, encoded, invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NOT_EXECUTABLE = 126
NOT_FOUND = 127
SETUP_FAILED = 125
"""Exit code of a child that never became the program; nobody sees it, the status pipe has told more."""
DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_MAX_ARGS = 4096
_MAX_STATUS_BYTES = 4096
_LAST_SIGNAL = 64


class ProcessSpec:
    """A ``process`` of a request, checked as far as that is possible before its root is at hand."""

    __slots__ = (
        "args",
        "capabilities",
        "envs",
        "group",
        "no_new_privileges",
        "rlimits",
        "supplementary_groups",
        "user",
        "workdir",
    )

    def __init__(self, params: Params) -> None:
        """Take *params* apart; raises `Failure` with ``invalid_argument``."""
        self.args = params.array("args", encoded, longest=_MAX_ARGS)
        if not self.args:
            raise invalid(params.path("args"), "is empty")
        self.envs = dict(params.array("envs", _variable, longest=_MAX_ARGS))
        self.workdir = params.text("workdir", "/")
        if not self.workdir.startswith("/"):
            raise invalid(params.path("workdir"), "must be an absolute path")
        self.user = params.text("user", "0", longest=256)
        self.group = params.optional_text("group", longest=256)
        self.supplementary_groups = params.array("supplementary_groups", _word, longest=64)
        self.rlimits = params.array("rlimits", limits.parse, longest=64)
        self.no_new_privileges = params.flag("no_new_privileges", True)
        names = params.array("capabilities", _word, longest=len(capabilities.NAMES))
        self.capabilities = capabilities.mask(names, params.path("capabilities"))
        params.done()


def _word(item: Any, path: str) -> str:
    return encoded(item, path, 256).decode()


def _variable(item: Any, path: str) -> tuple[bytes, bytes]:
    if type(item) is not list or len(item) != 2:
        raise invalid(path, "must be [name, value]")
    name, value = encoded(item[0], path), encoded(item[1], path)
    if not name or b"=" in name:
        raise invalid(path, "the name of a variable is empty or holds '='")
    return name, value


def exit_code(status: int) -> int:
    """The exit code for a wait status: the program's own, or 128 + the signal that ended it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def environment(envs: dict[bytes, bytes], home: bytes, hostname: str) -> dict[bytes, bytes]:
    """The environment of a program: *envs*, and PATH, HOME and HOSTNAME where they are not given."""
    return {b"PATH": DEFAULT_PATH, b"HOME": home, b"HOSTNAME": hostname.encode(), **envs}


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
    hostname = ""
    """For the environment."""

    def enter(self) -> None:
        """Runs in the child, as root of the guest; raises OSError or Failure."""
        os.chdir("/")


def spawn(spec: ProcessSpec, stdio: tuple[int, int, int], entry: Entry, own_pidns_fd: int) -> Spawned:
    """Start *spec*'s program.

    Args:
        spec: What to run.
        stdio: Descriptors of the child's stdin, stdout and stderr; they stay open in the caller.
        entry: Where to run it.
        own_pidns_fd: The caller's pid namespace, to come back to.

    Raises:
        Failure: ``internal``; no process could be made, nothing is left.
    """
    status_read, status_write = os.pipe()
    try:
        os.set_blocking(status_read, False)
        pid = _fork_into(entry, own_pidns_fd)
        if pid == 0:
            _child(spec, stdio, entry, status_write)
    except OSError as exc:
        os.close(status_read)
        raise Failure.of(exc, "start a process") from exc
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


def _fork_into(entry: Entry, own_pidns_fd: int) -> int:
    if entry.pid_namespace == Entry.SAME:
        return os.fork()
    if entry.pid_namespace == Entry.NEW:
        syscalls.unshare(syscalls.CLONE_NEWPID)
    else:
        syscalls.setns(entry.pid_namespace, syscalls.CLONE_NEWPID)
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid != 0:
            syscalls.setns(own_pidns_fd, syscalls.CLONE_NEWPID)
    return pid


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


def _child(spec: ProcessSpec, stdio: tuple[int, int, int], entry: Entry, status_fd: int) -> NoReturn:
    """Never returns, whatever happens: the parent's stack is below us."""
    try:
        _become(spec, stdio, entry, status_fd)
    except Failure as exc:
        _tell(status_fd, exc)
    except OSError as exc:
        _tell(status_fd, Failure.of(exc, "set up the process"))
    except BaseException as exc:  # also KeyboardInterrupt: nothing may unwind into the agent's loop
        _tell(status_fd, Failure(INTERNAL, f"The process could not be set up: {type(exc).__name__}: {exc}"))
    finally:
        os._exit(SETUP_FAILED)


def _tell(status_fd: int, failure: Failure) -> None:
    os.write(status_fd, json.dumps([failure.code, failure.message[:1000]]).encode())


def _become(spec: ProcessSpec, stdio: tuple[int, int, int], entry: Entry, status_fd: int) -> NoReturn:
    # Nothing of the agent's may be within reach of the container's files (CVE-2024-21626).
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
    _close_all_but(sorted({status_fd, *entry.keep_fds}))
    # The agent is exempt from the OOM killer; its children are not.
    _write_proc("/proc/self/oom_score_adj", b"0")
    os.setsid()
    os.umask(0o022)
    entry.enter()
    identity = users.resolve_here(spec.user, spec.group, spec.supplementary_groups)
    env = environment(spec.envs, identity.home, entry.hostname)
    _enter_workdir(spec.workdir)
    if identity.uid:
        _own_pipes(identity.uid)
    limits.apply(spec.rlimits)
    _drop_privileges(spec, identity)
    _reset_signals()
    _execute(spec.args, env)


def _close_all_but(kept: list[int]) -> None:
    lowest = 3
    for fd in kept:
        os.closerange(lowest, fd)
        lowest = fd + 1
    os.closerange(lowest, limits.AGENT_NOFILE)


def _write_proc(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, content)
    os.close(fd)


def _enter_workdir(path: str) -> None:
    try:
        os.chdir(path)
    except FileNotFoundError:
        try:
            os.makedirs(path, 0o755, exist_ok=True)
            os.chdir(path)
        except OSError as exc:
            raise _bad_workdir(path, exc) from exc
    except OSError as exc:
        raise _bad_workdir(path, exc) from exc


def _bad_workdir(path: str, exc: OSError) -> Failure:
    return invalid("process.workdir", f"{printable(path)!r} cannot be used: {exc.strerror}")


def _own_pipes(uid: int) -> None:
    """Let the user open /dev/stdout and the like again; runc does the same (fixStdioPermissions)."""
    for fd in (0, 1, 2):
        if not os.isatty(fd) and os.fstat(fd).st_mode & 0o170000 == 0o010000:
            os.fchown(fd, uid, -1)


def _drop_privileges(spec: ProcessSpec, identity: users.Identity) -> None:
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    capabilities.limit_bounding_set(spec.capabilities)
    # The set is laid down below, so it must outlive the change of user.
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    capabilities.limit(spec.capabilities)
    if spec.no_new_privileges:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def _reset_signals() -> None:
    """Undo what Python ignores: an ignored signal stays ignored in the program."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def candidates(program: bytes, path: bytes) -> list[bytes]:
    """The files that *program* may mean, in order: itself when it names a directory, else along *path*."""
    if b"/" in program:
        return [program]
    return [(directory or b".") + b"/" + program for directory in path.split(b":")]


def _execute(args: tuple[bytes, ...], env: dict[bytes, bytes]) -> NoReturn:
    problem: OSError | None = None
    for file in candidates(args[0], env[b"PATH"]) if args[0] else ():
        try:
            os.execve(file, args, env)  # noqa: S606 (what else)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            # As shells do: what is there but cannot be executed is remembered, the search goes on.
            problem = problem or exc
            if exc.errno not in (errno.EACCES, errno.EISDIR):
                break
    text = problem.strerror if problem is not None else "not found"
    os.write(2, f"vcnode: {printable(args[0])}: {text}\n".encode())
    os._exit(NOT_FOUND if problem is None else NOT_EXECUTABLE)
