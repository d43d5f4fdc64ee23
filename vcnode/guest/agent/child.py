"""What the child of a fork does to become a program.

::

    close all descriptors but its own  ->  new session  ->  enter (the namespaces and root of a container)
        ->  working directory  ->  limits  ->  capabilities, user, no_new_privs  ->  execve

A step that fails is told to the agent through the status pipe, which execve closes: end of file means that
the program runs, or could not be executed, in which case the child itself says so on its stderr and exits
with 126 or 127 as a shell would.

Each page that the child writes to costs a copy: what can be found out before the fork stands in the order.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys

from vcnode.guest.agent import launcher, limits, orders, rootfs, syscalls, ttys
from vcnode.guest.agent.entries import FILES, GUEST, JOIN, LAUNCH, MAIN
from vcnode.guest.agent.failures import INTERNAL, Failure, printable
from vcnode.guest.agent.params import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from vcnode.guest.agent.spawn import Order

NOT_EXECUTABLE = 126
NOT_FOUND = 127
_SETUP_FAILED = 125  # exit code that nobody sees: the status pipe has told more


def enter_guest(_fields: tuple[Any, ...], _fds: list[int]) -> None:
    """Stay in the guest."""
    os.chdir("/")


_ENTER: dict[str, Callable[[tuple[Any, ...], list[int]], None]] = {
    GUEST: enter_guest,
    MAIN: rootfs.enter_main,
    JOIN: rootfs.enter_join,
    LAUNCH: rootfs.enter_launch,
    FILES: rootfs.enter_files,
}


def stand_ready(sock_fd: int, *, guard_oom: bool) -> NoReturn:
    """Make all of a container that can be made before one is known, and wait for its `run`. Never returns.

    In a guest that becomes a template this spares each of its clones the fork and most of the mounts.

    Args:
        sock_fd: Where the order comes from; ended when nobody is there any more.
        guard_oom: See `run`.
    """
    try:
        _close_all_but([sock_fd])
        trees = rootfs.prepare()
        sock = socket.socket(fileno=sock_fd)
        sock.send(b"!")
        received = orders.receive(sock)
        if received is not None:
            run(*received, guard_oom=guard_oom, trees=trees)
    except BaseException as exc:
        print(f"vcnode-agent: no process stands ready: {exc!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(_SETUP_FAILED)


def run(order: Order, fds: list[int], *, guard_oom: bool, trees: rootfs.Trees | None = None) -> NoReturn:
    """Become the program of *order*. Never returns, whatever happens: the parent's loop is below.

    Args:
        order: See `spawn.Order`.
        fds: stdin, stdout, stderr, the status pipe, and those of the entry.
        guard_oom: Whether this process is exempt from the OOM killer, as the agent is, and has to give it up.
        trees: What this process has prepared; see `stand_ready`.
    """
    status_fd = fds[3]
    try:
        if guard_oom:
            _face_oom_killer()
        _become(order, fds, trees)
    except Failure as exc:
        _tell(status_fd, exc)
    except OSError as exc:
        _tell(status_fd, Failure.of(exc, "set up the process"))
    except BaseException as exc:  # also KeyboardInterrupt: nothing may unwind into the loop
        _tell(status_fd, Failure(INTERNAL, f"The process could not be set up: {type(exc).__name__}: {exc}"))
    finally:
        os._exit(_SETUP_FAILED)


def _face_oom_killer() -> None:
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, b"0")
    os.close(fd)


def _tell(status_fd: int, failure: Failure) -> None:
    os.write(status_fd, json.dumps([failure.code, failure.message[:1000]]).encode())


def _become(order: Order, fds: list[int], trees: rootfs.Trees | None) -> NoReturn:
    args, env, files, workdir, rlimits, dropped, no_new_privileges, ids, terminal, copy, kind, fields = order
    for number in range(3):
        os.dup2(fds[number], number)
    # Nothing of the guest's may be within reach of the container's files (CVE-2024-21626).
    _close_all_but(sorted([*fds[3:], *(fd for _, fd in trees or ())]))
    os.setsid()
    if copy is not None:
        from vcnode.guest.agent import copying  # while its files are within reach
    if trees is None:
        _ENTER[kind](fields, fds[4:])
    else:
        rootfs.enter_main(fields, fds[4:], trees)
    if copy is not None:
        os.close(fds[3])  # as execve would: it runs
        os._exit(copying.run(*copy))
    if terminal is not None:
        ttys.take(terminal, ids[0])
    if workdir != "/":
        _enter_workdir(workdir)
    limits.apply(rlimits)
    _drop_privileges(ids, dropped, no_new_privileges=no_new_privileges)
    if kind == LAUNCH:
        syscalls.drop_capabilities(dropped)
        os.close(fds[3])
        launcher.serve(socket.socket(fileno=os.dup(0)), *fds[4:6])
    _execute(files, args, env)


def _close_all_but(kept: list[int]) -> None:
    lowest = 3
    for fd in kept:
        os.closerange(lowest, fd)
        lowest = fd + 1
    os.closerange(lowest, limits.AGENT_NOFILE)


def _enter_workdir(path: str) -> None:
    try:
        try:
            os.chdir(path)
        except FileNotFoundError:
            os.makedirs(path, 0o755, exist_ok=True)
            os.chdir(path)
    except OSError as exc:
        raise invalid("process.workdir", f"{printable(path)!r} cannot be used: {exc.strerror}") from exc


def _drop_privileges(
    ids: tuple[int, int, tuple[int, ...]], dropped: tuple[int, ...], *, no_new_privileges: bool
) -> None:
    """Give up what the program is not to have.

    The bounding set is all that needs to be cut: the agent's inheritable and ambient sets are empty, so
    execve leaves root with exactly the bounding set, and any other user with nothing; capabilities(7),
    Transformation of capabilities during execve().
    """
    uid, gid, groups = ids
    give_pipes_to(uid, (0, 1, 2))
    for number in dropped:
        syscalls.drop_from_bounding_set(number)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if no_new_privileges:
        syscalls.set_no_new_privileges()


def give_pipes_to(uid: int, stdio: tuple[int, int, int]) -> None:
    """Let the user open /dev/stdout and the like again; runc does the same (fixStdioPermissions)."""
    for fd in stdio if uid else ():
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, uid, -1)


def _execute(files: tuple[bytes, ...], args: tuple[bytes, ...], env: dict[bytes, bytes]) -> NoReturn:
    problem: OSError | None = None
    for file in files:
        try:
            os.execve(file, args, env)  # noqa: S606 (what else)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            # As shells do: what is there but cannot be executed is remembered, the search goes on.
            problem = problem or exc
            if exc.errno != errno.EACCES:
                break
    text = problem.strerror if problem is not None else "not found"
    os.write(2, f"vcnode: {printable(args[0])}: {text}\n".encode())
    os._exit(NOT_FOUND if problem is None else NOT_EXECUTABLE)
