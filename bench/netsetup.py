"""``netsetup``: one pod's network, made and removed, by the driver and by a script that repeats its messages.

The floor sends the very messages that the driver was heard to send, over raw sockets, and makes namespace and
tap by the same system calls. What is left is what the driver thinks, and what its library takes to say it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pyroute2.netlink.core import NoClose

from bench.options import Options
from bench.report import Result, Series
from vcnode.drivers import namespaces
from vcnode.drivers.network import taps
from vcnode.drivers.network.bridge import BridgeNetwork, names
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import BridgeSettings

MARK = "vm-bench"
VM_ID = f"{MARK}0000001"
REACH = 1.5
LIMIT_S = 20.0
_CLONE_NEWNET, _MS_BIND, _MNT_DETACH = 0x40000000, 0x1000, 2
_RTM_NEWLINK = 16
_NLM_F_ACK, _NLM_F_DUMP, _NLMSG_DONE, _NLMSG_ERROR = 0x4, 0x300, 3, 2
_IFLA_NET_NS_FD = 28
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Message:
    """A message that the driver has sent."""

    inside: bool
    """Whether in the pod's namespace."""
    data: bytes
    """Empty: here it has made the tap."""


class Recorder:
    """Hears what pyroute2 sends."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For the length of the block."""
        original = NoClose.send, NoClose.sendto

        def note(sock: Any, data: bytes) -> None:
            cookie = sock.getsockopt(socket.SOL_SOCKET, 71, 8)  # SO_NETNS_COOKIE
            self.messages.append(Message(cookie != _HOME_COOKIE[0], bytes(data)))

        def send(sock: Any, data: bytes, *rest: Any) -> Any:
            note(sock, data)
            return original[0](sock, data, *rest)

        def sendto(sock: Any, data: bytes, *rest: Any) -> Any:
            note(sock, data)
            return original[1](sock, data, *rest)

        with _open() as own:
            _HOME_COOKIE[:] = [own.getsockopt(socket.SOL_SOCKET, 71, 8)]
        make = taps.make

        def make_tap(name: str) -> None:
            make(name)
            self.messages.append(Message(True, b""))

        NoClose.send, NoClose.sendto = send, sendto
        try:
            with mock.patch.object(taps, "make", make_tap):
                yield
        finally:
            NoClose.send, NoClose.sendto = original


_HOME_COOKIE: list[bytes] = []


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)


class Replay:
    """The floor.

    Args:
        made: What was heard while a network was made.
        removed: And while it was removed.
        veth_index: Index of its interface at the host's end, as it was then.
    """

    def __init__(self, made: Sequence[Message], removed: Sequence[Message], veth_index: int) -> None:
        self._made = made
        self._removed = removed
        self._then = struct.pack("=i", veth_index)
        self._now = self._then

    def run(self) -> None:
        """Make a network and remove it, in a thread, as the driver does."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self._work()
            except BaseException as exc:
                failed.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def _work(self) -> None:
        path = namespaces.path_of(VM_ID)
        with _open() as outside:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0))
            _libc.unshare(_CLONE_NEWNET)
            own = f"/proc/self/task/{threading.get_native_id()}/ns/net"
            _libc.mount(own.encode(), path.encode(), None, ctypes.c_ulong(_MS_BIND), None)
            for name in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            namespace = os.open(path, os.O_RDONLY)
            with _open() as inside:
                for message in self._made:
                    if not message.data:
                        taps.make("tap0")
                        continue
                    self._send(inside if message.inside else outside, message.data, namespace)
            os.close(namespace)
            for message in self._removed:
                self._send(outside, message.data, -1)
        _libc.umount2(path.encode(), _MNT_DETACH)
        os.unlink(path)

    def _send(self, sock: socket.socket, data: bytes, namespace: int) -> None:
        kind, flags = struct.unpack_from("=HH", data, 4)
        at = data.find(struct.pack("=HH", 8, _IFLA_NET_NS_FD))
        if kind == _RTM_NEWLINK and at >= 0:
            data = data[: at + 4] + struct.pack("=I", namespace) + data[at + 8 :]
        if data[20:24] == self._then:
            data = data[:20] + self._now + data[24:]
        sock.settimeout(LIMIT_S)
        sock.send(data)
        asks = kind % 4 == 2  # RTM_GET…
        is_dump = asks and flags & _NLM_F_DUMP == _NLM_F_DUMP
        while True:
            answer = sock.recv(65536)
            answered = struct.unpack_from("=H", answer, 4)[0]
            if answered == _NLMSG_ERROR:
                error = struct.unpack_from("=i", answer, 16)[0]
                if error:
                    raise OSError(-error, os.strerror(-error), f"message {kind}")
                return
            if answered == _RTM_NEWLINK and VM_ID[3:].encode() in answer:
                self._now = answer[20:24]
            if (is_dump and _ends(answer)) or (asks and not is_dump and not flags & _NLM_F_ACK):
                return


def _ends(answer: bytes) -> bool:
    """Whether a part of a dump holds its end."""
    at = 0
    while at + 16 <= len(answer):
        length, kind = struct.unpack_from("=IH", answer, at)
        if kind == _NLMSG_DONE:
            return True
        at += (length + 3) & ~3
    return False


async def netsetup(options: Options) -> Result:
    """One pod's network, made and removed: the driver against the same messages by a script."""
    from tests.support.netns import private_network

    count = 10 if options.quick else 60
    with private_network():
        network = BridgeNetwork(BridgeSettings(), MARK, None)
        await network.open()
        other = network.plan(NetworkRequest(pod_id="other", vm_id=f"{MARK}0000002"), ())
        await network.attach(other, timeout_s=LIMIT_S)  # so that the bridge is there
        planned = network.plan(NetworkRequest(pod_id="pod", vm_id=VM_ID), (other,))
        try:
            replay = await _heard(network, planned)
            ours, bare = await _measure(network, planned, replay, count)
        finally:
            await network.detach(other, timeout_s=LIMIT_S)
            await network.close()
    series = (
        Series("network of a pod", "ms", tuple(a + b for a, b in ours)),
        Series("of which set-up", "ms", tuple(a for a, _ in ours)),
        Series("of which tear-down", "ms", tuple(b for _, b in ours)),
        Series("the same messages by a script", "ms", tuple(bare)),
    )
    return Result(
        bench="netsetup",
        ratio=series[0].median / series[3].median,
        of="set-up and tear-down of one pod's network / the same netlink messages sent by a script",
        reach=REACH,
        series=series,
    )


async def _heard(network: BridgeNetwork, planned: NetworkAttachment) -> Replay:
    """What the driver says for one pod."""
    made, removed = Recorder(), Recorder()
    with made.listening():
        await network.attach(planned, timeout_s=LIMIT_S)
    index = socket.if_nametoindex(names.host_interface(VM_ID, "0"))
    with removed.listening():
        await network.detach(planned, timeout_s=LIMIT_S)
    return Replay(made.messages, removed.messages, index)


async def _measure(
    network: BridgeNetwork, planned: NetworkAttachment, replay: Replay, count: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """Milliseconds of set-up and tear-down, and of the floor, by turns."""
    ours: list[tuple[float, float]] = []
    bare: list[float] = []
    for number in range(count + 1):
        began = time.perf_counter()
        await network.attach(planned, timeout_s=LIMIT_S)
        made = time.perf_counter()
        await network.detach(planned, timeout_s=LIMIT_S)
        ended = time.perf_counter()
        await asyncio.to_thread(replay.run)
        floor = time.perf_counter() - ended
        if number:  # the first one warms up
            ours.append(((made - began) * 1000, (ended - made) * 1000))
            bare.append(floor * 1000)
    return ours, bare
