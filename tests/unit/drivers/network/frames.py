"""Ethernet frames for tests, and what a classic BPF program makes of them."""

from __future__ import annotations

import ipaddress
import struct

VNET_HEADER = bytes(10)
"""What stands before each frame of a tap: nothing is left to be done."""


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(src: str, dst: str, kind: int, payload: bytes) -> bytes:
    frame = mac(dst) + mac(src) + struct.pack("!H", kind) + payload
    return frame + bytes(max(0, 60 - len(frame)))


def arp(
    src: str, sender_mac: str, sender_ip: str, target_ip: str, *, dst: str = "ff:ff:ff:ff:ff:ff"
) -> bytes:
    """An ARP request."""
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    body += mac(sender_mac) + ipaddress.IPv4Address(sender_ip).packed
    body += bytes(6) + ipaddress.IPv4Address(target_ip).packed
    return ethernet(src, dst, 0x0806, body)


def udp4(src_mac: str, dst_mac: str, src: str, dst: str, data: bytes = b"x", *, port: int = 7) -> bytes:
    """A datagram over IPv4, without the checksum of UDP."""
    udp = struct.pack("!HHHH", port, port, 8 + len(data), 0) + data
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(udp),
        0,
        0,
        64,
        17,
        0,
        ipaddress.IPv4Address(src).packed,
        ipaddress.IPv4Address(dst).packed,
    )
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return ethernet(src_mac, dst_mac, 0x0800, header + udp)


def icmp6(src_mac: str, dst_mac: str, src: str, dst: str, kind: int, body: bytes = b"") -> bytes:
    """An ICMPv6 message of a type, with what follows the checksum."""
    source, destination = ipaddress.IPv6Address(src).packed, ipaddress.IPv6Address(dst).packed
    message = struct.pack("!BBH", kind, 0, 0) + body
    pseudo = source + destination + struct.pack("!II", len(message), 58)
    message = message[:2] + struct.pack("!H", checksum(pseudo + message)) + message[4:]
    header = struct.pack("!IHBB", 6 << 28, len(message), 58, 255) + source + destination
    return ethernet(src_mac, dst_mac, 0x86DD, header + message)


def advertisement(src_mac: str, src: str, target: str, *, dst: str = "ff02::1") -> bytes:
    """A neighbour advertisement that claims *target*."""
    body = struct.pack("!I", 0x20000000) + ipaddress.IPv6Address(target).packed + b"\x02\x01" + mac(src_mac)
    return icmp6(src_mac, "33:33:00:00:00:01", src, dst, 136, body)


def extended(frame: bytes, kind: int, header: bytes = bytes(7)) -> bytes:
    """An IPv6 frame with an extension header of a kind; *header* is what follows that header's first byte."""
    payload = frame[20:21] + header + frame[54:]
    return frame[:18] + struct.pack("!HB", len(payload), kind) + frame[21:54] + payload


def fragment(frame: bytes, *, offset: int = 0, more: bool = False) -> bytes:
    """An IPv6 frame as a fragment, at an offset in units of 8 bytes."""
    return extended(frame, 44, bytes(1) + struct.pack("!HI", offset << 3 | more, 7))


def tagged(frame: bytes, vlan: int) -> bytes:
    """A frame in a VLAN."""
    return frame[:12] + struct.pack("!HH", 0x8100, vlan) + frame[12:]


def checksum(data: bytes) -> int:
    """Source: RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def run(code: bytes, frame: bytes) -> int:
    """What the kernel's interpreter returns for a program of `vcnode.drivers.network.bpf` and a frame."""
    program = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    at = accumulator = 0
    while True:
        operation, then, otherwise, k = program[at]
        at += 1
        match operation:
            case 0x20 | 0x28 | 0x30:
                size = {0x20: 4, 0x28: 2, 0x30: 1}[operation]
                if k + size > len(frame):
                    return 0  # the kernel ends the program, with 0
                accumulator = int.from_bytes(frame[k : k + size], "big")
            case 0x80:
                accumulator = len(frame)
            case 0x35:
                at += then if accumulator >= k else otherwise
            case 0x54:
                accumulator &= k
            case 0x15:
                at += then if accumulator == k else otherwise
            case 0x05:
                at += k
            case 0x06:
                return int(k)
            case _:
                raise AssertionError(operation)
