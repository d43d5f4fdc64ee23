"""Which ports of the host its own programs listen on: a published port would take their traffic away.

A rule that leads a port to a pod comes before any socket of the host, so nothing else would tell.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path

from vcnode.errors import FailedPreconditionError
from vcnode.models.network import PortMapping

TABLES = {"tcp": ("tcp", "tcp6"), "udp": ("udp", "udp6")}
"""Files below /proc/net, by protocol."""
_WAITING = {"tcp": "0A", "udp": "07"}
"""TCP_LISTEN; and TCP_CLOSE, which is what a datagram socket without a peer is in. Source: proc(5)."""


def parse(text: str, protocol: str) -> Iterator[int]:
    """Ports of the sockets in such a file that wait for anybody, but those on 127.0.0.1 and ::1 only."""
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) > 3 and words[3] == _WAITING[protocol]:
            address, _, port = words[1].partition(":")
            if not _loopback(address):
                yield int(port, 16)


def _loopback(words: str) -> bool:
    """Whether an address, in 32-bit words of the host's byte order, is of the loopback."""
    packed = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check(ports: Iterable[PortMapping]) -> None:
    """See that nobody in the calling thread's namespace listens on one of the ports.

    Raises:
        FailedPreconditionError: Somebody does; names the port.
    """
    wanted = list(ports)
    taken = {
        (port, protocol)
        for protocol in {mapping.protocol for mapping in wanted}
        for table in TABLES[protocol]
        for port in parse(_read(table), protocol)
    }
    for index, mapping in enumerate(wanted):
        if (mapping.host, mapping.protocol) in taken:
            field = f"pod.network.ports[{index}].host"
            raise FailedPreconditionError(
                f"{field}: a program of the host listens on {mapping.protocol} port {mapping.host}; "
                "end it, or publish another port.",
                field=field,
            )


def _read(table: str) -> str:
    try:
        return Path("/proc/thread-self/net", table).read_text()
    except OSError:  # a kernel without IPv6 has no such file
        return ""
