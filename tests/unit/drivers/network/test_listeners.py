"""Who listens on the host, as /proc tells it."""

from __future__ import annotations

import socket

import pytest

from vcnode.drivers.network import listeners
from vcnode.errors import FailedPreconditionError
from vcnode.models.network import PortMapping

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TCP = (
    "   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
    "   1: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1\n"
    "   2: 0177770A:1F92 0277770A:1234 01 00000000:00000000 00:00000000 00000000     0        0 3 1\n"
)
UDP6 = (
    "  10: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 0 0 0 0\n"
    "  11: 6E6376FD0000646F0000000001000000:0036 00000000000000000000000000000000:0000 07 0 0 0 0\n"
    "  12: 0000000000000000FFFF00000100007F:0037 00000000000000000000000000000000:0000 07 0 0 0 0\n"
)


@pytest.mark.parametrize(
    ("text", "protocol", "ports"),
    [
        pytest.param(HEAD + TCP, "tcp", [0x1F90], id="not-the-loopback-nor-the-connected"),
        pytest.param(HEAD + UDP6, "udp", [0x36], id="not-the-loopback-of-ipv6"),
        pytest.param("", "tcp", [], id="empty"),
        pytest.param(HEAD + "   0: junk\n", "tcp", [], id="a-line-that-makes-no-sense"),
    ],
)
def test_those_who_wait_for_anybody_are_found(text: str, protocol: str, ports: list[int]):
    assert list(listeners.parse(text, protocol)) == ports


def test_a_port_of_this_hosts_own_is_told_with_its_place_in_the_request():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        mapping = PortMapping(host=port, container=80)
        listeners.check([PortMapping(host=port, container=80, protocol="udp")])
        with pytest.raises(FailedPreconditionError, match=rf"ports\[1\]\.host: .* tcp port {port}"):
            listeners.check([PortMapping(host=port, container=1, protocol="udp"), mapping])
    listeners.check([mapping])
