"""The process that forks for the agent.

A fork write-protects all memory of the process that calls it, and each page that it writes to afterwards
costs a fault: some 400 for the agent, most of an exec's time in an emulated guest. This process touches few
pages, and holds no descriptor that a container should not come near. Its children are made with CLONE_PARENT,
so they are the agent's, which waits for them.

It is a child of the agent and ends when the agent does. An order comes as a length with the descriptors,
followed by the marshalled `spawn.Order`; the answer is a pid and an error number.
"""

from __future__ import annotations

import array
import gc
import marshal
import os
import socket
import struct

from vcnode.guest.agent import child, syscalls
from vcnode.guest.agent.entries import GUEST, JOIN, LAUNCH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from vcnode.guest.agent.spawn import Order

HEADER = struct.Struct("<I")
ANSWER = struct.Struct("<ii")
MAX_FDS = 7
"""stdin, stdout, stderr, status, and three of an entry."""


def serve(sock: socket.socket, *, guard_oom: bool) -> NoReturn:
    """Fork at the agent's orders until it hangs up.

    Args:
        sock: A stream socket to the agent; all other descriptors but the standard ones are closed.
        guard_oom: Whether this process is exempt from the OOM killer, which its children must not be: each
            gives that up itself. A fork takes memory, so it is when the killer comes.
    """
    os.closerange(3, sock.fileno())
    os.closerange(sock.fileno() + 1, 1 << 20)
    own_pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    gc.collect()
    gc.freeze()
    # Nothing here makes cycles, and a collection would touch what has been frozen.
    gc.disable()
    while received := _receive(sock):
        order, fds = received
        answer = _answer(order, fds, own_pidns, guard_oom=guard_oom)
        for fd in fds:
            os.close(fd)
        sock.sendall(answer)
    os._exit(0)


def _receive(sock: socket.socket) -> tuple[Order, list[int]] | None:
    """The next order and its descriptors; None when the agent has gone."""
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    header, control, _, _ = sock.recvmsg(HEADER.size, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL)
    if len(header) < HEADER.size:
        return None
    fds = array.array("i")
    for _level, _kind, data in control:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    (length,) = HEADER.unpack(header)
    content = sock.recv(length, socket.MSG_WAITALL)
    if len(content) < length:
        return None
    return marshal.loads(content), list(fds)  # noqa: S302 (from the agent, whose fork this is)


def _answer(order: Order, fds: list[int], own_pidns: int, *, guard_oom: bool) -> bytes:
    try:
        pid = _fork(order, fds, own_pidns)
    except OSError as exc:
        return ANSWER.pack(0, exc.errno or 0)
    if pid == 0:
        child.run(order, fds, guard_oom=guard_oom)
    return ANSWER.pack(pid, 0)


def _fork(order: Order, fds: list[int], own_pidns: int) -> int:
    """Fork with the pid namespace that the order asks for; a process never changes its own."""
    kind = order[-2]
    if kind == JOIN:
        syscalls.setns(fds[-1], syscalls.CLONE_NEWPID)
    elif kind not in (GUEST, LAUNCH):
        syscalls.unshare(syscalls.CLONE_NEWPID)
    pid = -1
    try:
        pid = syscalls.fork_sibling()
    finally:
        if pid != 0 and kind != GUEST:
            syscalls.setns(own_pidns, syscalls.CLONE_NEWPID)
    return pid
