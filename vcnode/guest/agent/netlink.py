"""Just enough of rtnetlink to set interfaces up. All raise OSError like the calls of ``os``.

Source: rtnetlink(7), linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h.
"""

from __future__ import annotations

import os
import socket
import struct

_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE = 16, 20, 24
_NLMSG_ERROR = 2
_REQUEST, _ACK, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY = 1, 4, 5, 6
_IFF_UP = 0x1
_IFA_F_NODAD = 0x02
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST = 254, 4, 1
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_RTNH_F_ONLINK = 4
_TIMEOUT_S = 5.0


def _attribute(kind: int, value: bytes) -> bytes:
    padding = -len(value) % 4
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(padding)


class Netlink:
    """A conversation with the kernel about the network."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def set_link(self, index: int, *, name: str | None, mac: bytes, mtu: int, up: bool) -> None:
        """Change an interface: its MAC, MTU, name, and whether it is up."""
        body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, _IFF_UP)
        body += _attribute(_IFLA_ADDRESS, mac) + _attribute(_IFLA_MTU, struct.pack("=I", mtu))
        if name is not None:
            body += _attribute(_IFLA_IFNAME, name.encode() + b"\0")
        self._ask(_RTM_NEWLINK, 0, body)

    def add_address(self, index: int, family: int, address: bytes, prefix_length: int) -> None:
        """Give an interface an address, at once: nobody else can have it."""
        flags = _IFA_F_NODAD if family == socket.AF_INET6 else 0
        body = struct.pack("=BBBBi", family, prefix_length, flags, _SCOPE_UNIVERSE, index)
        body += _attribute(_IFA_LOCAL, address) + _attribute(_IFA_ADDRESS, address)
        host_bits = 32 - prefix_length
        if family == socket.AF_INET and host_bits > 1:
            (number,) = struct.unpack("!I", address)
            body += _attribute(_IFA_BROADCAST, struct.pack("!I", number | ((1 << host_bits) - 1)))
        self._ask(_RTM_NEWADDR, _CREATE | _REPLACE, body)

    def add_route(
        self,
        index: int,
        family: int,
        destination: tuple[bytes, int],
        gateway: bytes | None,
        *,
        on_link: bool,
        metric: int | None,
    ) -> None:
        """Add a route through an interface."""
        address, length = destination
        scope = _SCOPE_LINK if gateway is None and family == socket.AF_INET else _SCOPE_UNIVERSE
        flags = _RTNH_F_ONLINK if on_link and gateway is not None else 0
        body = struct.pack(
            "=BBBBBBBBI",
            family,
            length,
            0,
            0,
            _RT_TABLE_MAIN,
            _RTPROT_STATIC,
            scope,
            _RTN_UNICAST,
            flags,
        )
        if length:
            body += _attribute(_RTA_DST, address)
        if gateway is not None:
            body += _attribute(_RTA_GATEWAY, gateway)
        if metric is not None:
            body += _attribute(_RTA_PRIORITY, struct.pack("=I", metric))
        body += _attribute(_RTA_OIF, struct.pack("=i", index))
        self._ask(_RTM_NEWROUTE, _CREATE | _REPLACE, body)

    def _ask(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, self._sequence, 0)
        self._socket.send(header + body)
        answer = self._socket.recv(65536)
        _, kind, _, sequence, _ = struct.unpack_from("=IHHII", answer)
        if kind != _NLMSG_ERROR or sequence != self._sequence:
            raise OSError(71, "the kernel answered something else")  # EPROTO
        (error,) = struct.unpack_from("=i", answer, 16)
        if error:
            raise OSError(-error, os.strerror(-error))
