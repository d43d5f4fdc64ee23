"""Starts programs in a running container without a fork.

A fork copies the page tables of a whole interpreter, and each page that is written to afterwards costs a
fault: in an emulated guest most of what an exec takes. So a container in which something is executed again
gets a launcher: a child of the agent that has entered the container's namespaces, has its main process's
privileges and no others, and starts programs by posix_spawn(3), which copies nothing. It is not in the
container's pid namespace, so nothing in there sees it, and in its cgroup only while it starts a program.

It does what is common and declines all else: no terminal, no resource limits, no user but its own, no program
or directory that is not there. What it declines goes by `forker`, which also says what is wrong. A container
that stops a program in the instant of its start holds up the commands in itself, not the agent.
"""

from __future__ import annotations

import array
import marshal
import os
import select
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

ANSWER = struct.Struct("<ii")
"""A pid and a wait status, when that process has ended; or a pid (0: declined) and `BEGUN`, with a pidfd."""
BEGUN = -1
MAX_ORDER_BYTES = 64 * 1024


def receive(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """A message of at most *size* bytes with at most *most* descriptors, which execve closes.

    `socket.recv_fds` of Python 3.11 drops the flag that sees to that.
    """
    fds = array.array("i")
    space = socket.CMSG_SPACE(most * fds.itemsize)
    content, control, _, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for _level, _kind, data in control:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return content, list(fds)


def serve(sock: socket.socket, group_fd: int, home_fd: int) -> NoReturn:
    """Start programs until the agent hangs up.

    Args:
        sock: To the agent, SOCK_SEQPACKET; all descriptors are closed on execve.
        group_fd: cgroup.procs of the container's group.
        home_fd: That of the group that the caller is in.
    """
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    running: dict[int, int] = {}
    while True:
        for fd, _ in poll.poll():
            if (pid := running.pop(fd, 0)) > 0:
                poll.unregister(fd)
                os.close(fd)
                sock.send(ANSWER.pack(*os.waitpid(pid, 0)))
                continue
            content, stdio = receive(sock, MAX_ORDER_BYTES, 3)
            if not content:
                os._exit(0)
            pid = _launch(marshal.loads(content), stdio, group_fd, home_fd)  # noqa: S302 (from the agent)
            for end in stdio:
                os.close(end)
            if not pid:
                sock.send(ANSWER.pack(0, BEGUN))
                continue
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid
            poll.register(pidfd, select.POLLIN)
            socket.send_fds(sock, [ANSWER.pack(pid, BEGUN)], [pidfd])


def _launch(
    order: tuple[tuple[bytes, ...], dict[bytes, bytes], tuple[bytes, ...], str],
    stdio: list[int],
    group_fd: int,
    home_fd: int,
) -> int:
    """The pid of a new process, which runs its program by then; 0 when that cannot be."""
    args, env, files, workdir = order
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
    try:
        os.chdir(workdir)
        os.write(group_fd, b"0")
        for file in files:
            try:
                return os.posix_spawn(file, args, env, file_actions=actions, setsid=True)
            except (FileNotFoundError, NotADirectoryError):
                continue
    except OSError:
        return 0
    finally:
        os.write(home_fd, b"0")
        os.chdir("/")
    return 0
