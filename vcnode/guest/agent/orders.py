"""Orders to a process that is to make or become another one: over a stream socket, with descriptors."""

from __future__ import annotations

import array
import marshal
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_HEADER = struct.Struct("<I")
MAX_FDS = 7
"""stdin, stdout, stderr, status, and three of an entry."""


def send(sock: socket.socket, order: tuple[Any, ...], fds: Sequence[int]) -> None:
    """Send an order of plain data; the caller keeps the descriptors. Raises OSError."""
    content = marshal.dumps(order)
    socket.send_fds(sock, [_HEADER.pack(len(content))], fds)
    sock.sendall(content)


def receive(sock: socket.socket) -> tuple[Any, list[int]] | None:
    """The next order and its descriptors, which execve closes; None when the other side has gone."""
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    header, control, _, _ = sock.recvmsg(_HEADER.size, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL)
    if len(header) < _HEADER.size:
        return None
    fds = array.array("i")
    for _level, _kind, data in control:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    (length,) = _HEADER.unpack(header)
    content = sock.recv(length, socket.MSG_WAITALL)
    if len(content) < length:
        return None
    return marshal.loads(content), list(fds)  # noqa: S302 (from the agent, whose fork this is)
