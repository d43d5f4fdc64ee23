"""The process that forks for the agent.

A fork write-protects all memory of the process that calls it, and each page that it writes to afterwards
costs a fault: some 400 for the agent, most of an exec's time in an emulated guest. This process touches few
pages, and holds no descriptor that a container should not come near. Its children are made with CLONE_PARENT,
so they are the agent's, which waits for them.

It is a child of the agent and ends when the agent does. It gets `spawn.Order`; the answer is a pid and an
error number.
"""

from __future__ import annotations

import gc
import os
import struct

from vcnode.guest.agent import child, orders, syscalls
from vcnode.guest.agent.entries import AHEAD, GUEST, JOIN, LAUNCH

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

    from vcnode.guest.agent.spawn import Order

ANSWER = struct.Struct("<ii")


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
    while received := orders.receive(sock):
        order, fds = received
        answer = _answer(order, fds, own_pidns, guard_oom=guard_oom)
        for fd in fds:
            os.close(fd)
        sock.sendall(answer)
    os._exit(0)


def _answer(order: Order, fds: list[int], own_pidns: int, *, guard_oom: bool) -> bytes:
    try:
        pid = _fork(order, fds, own_pidns)
    except OSError as exc:
        return ANSWER.pack(0, exc.errno or 0)
    if pid == 0 and order[-2] == AHEAD:
        child.stand_ready(fds[0], guard_oom=guard_oom)
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
