"""Guests without VMs: a network namespace of the test's own whose interface is the other end of a pod's tap.

What the kernel there sends goes through the same taps, filters and bridges as a VM's frames, so connections,
pings and lookups are real ones. Frames are carried by a thread, some tens of thousands a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tests.support import networks
from vcnode.drivers import namespaces
from vcnode.drivers.network import taps
from vcnode.models.vm import NetworkAttachment

T = TypeVar("T")
_FRAME_BYTES = 1 << 17


class Peer:
    """The guest of a pod."""

    def __init__(self, path: str, attachment: NetworkAttachment) -> None:
        self.path = path
        self.attachment = attachment
        self.addresses = [a.partition("/")[0] for a in attachment.endpoints[0].addresses]

    def do(self, work: Callable[[], T]) -> T:
        """Do something inside."""
        return namespaces.call(self.path, work)

    def run(self, *argv: str) -> str:
        """The output of a program inside, which must succeed."""
        return networks.run(*argv, netns=self.path)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the guest's."""
        return self.do(lambda: socket.socket(family, kind))


@contextlib.contextmanager
def peer(name: str, attachment: NetworkAttachment, tap: int) -> Iterator[Peer]:
    """A guest that has what the endpoint says, at the other end of an open tap, for a block."""
    endpoint = attachment.endpoints[0]
    with networks.named(name) as path:
        made = Peer(path, attachment)

        def open_own() -> int:
            taps.make("eth0")
            return taps.open_for_qemu("eth0")

        own = made.do(open_own)
        stop = os.eventfd(0)
        carrier = threading.Thread(target=_carry, args=(own, tap, stop))
        try:
            made.run("ip", "link", "set", "lo", "up")
            made.run("ip", "link", "set", "eth0", "address", endpoint.mac, "mtu", str(endpoint.mtu), "up")
            for address in endpoint.addresses:
                made.run("ip", "addr", "add", address, "dev", "eth0", *(("nodad",) * (":" in address)))
            for route in endpoint.routes:
                made.run("ip", "route", "add", route.destination, "via", str(route.gateway))
            carrier.start()
            yield made
        finally:
            os.eventfd_write(stop, 1)
            if carrier.ident is not None:
                carrier.join()
            os.close(own)
            os.close(stop)


def _carry(one: int, other: int, stop: int) -> None:
    """Carry frames both ways until *stop* can be read."""
    ways = {one: other, other: one}
    for fd in ways:
        os.set_blocking(fd, False)
    while True:
        ready, _, _ = select.select([*ways, stop], [], [])
        if stop in ready:
            return
        for fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.write(ways[fd], os.read(fd, _FRAME_BYTES))


def transfer(sender: socket.socket, receiver: socket.socket, size_bytes: int) -> float:
    """Mbit/s with which so many bytes come from one end of a connection to the other."""
    thread = threading.Thread(target=sender.sendall, args=(bytes(size_bytes),))
    receiver.settimeout(60)
    began = time.perf_counter()
    thread.start()
    left = size_bytes
    while left:
        left -= len(receiver.recv(min(left, 1 << 16)))
    took_s = time.perf_counter() - began
    thread.join()
    return size_bytes * 8 / 1e6 / took_s


def connection(client: socket.socket, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Connect a socket to a bound one; both ends of the connection. The server's is closed."""
    server.listen(1)
    server.settimeout(20)
    client.settimeout(20)
    client.connect(server.getsockname()[:2])
    accepted, _ = server.accept()
    server.close()
    return client, accepted
