"""What makes this guest itself: clock, entropy, names. A clone has the template's until it is told."""

from __future__ import annotations

import binascii
import fcntl
import os
import re
import struct
import time

from vcnode.guest.agent import files, network, syscalls, watchdog
from vcnode.guest.agent.params import Params, invalid

ETC = "/run/vcnode/etc"
"""Where the files are that /etc of the guest links to; its own root is read-only."""
MAX_ENTROPY_BYTES = 4096

# include/uapi/linux/random.h
_RNDADDENTROPY = 0x4008_5203
_RNDRESEEDCRNG = 0x5207
_POOL_INFO = struct.Struct("<ii")

_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?")
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")


def hostname(params: Params) -> str:
    """Take ``hostname`` from *params*, checked as hostname(7) has it: the kernel's limit is 64 bytes."""
    name = params.text("hostname", longest=63)
    if not _HOSTNAME.fullmatch(name):
        raise invalid(params.path("hostname"), f"{name!r} is no host name")
    return name


def time_ns(params: Params) -> int:
    """Take ``time_ns`` from *params*: nanoseconds since 1970."""
    return params.integer("time_ns", 0, (1 << 63) - 1)


def set_clock(now_ns: int) -> None:
    """Set the wall clock; timers of processes go by the monotonic one, which does not jump."""
    time.clock_settime_ns(time.CLOCK_REALTIME, now_ns)


class Identity:
    """The params of ``configure``, checked."""

    __slots__ = ("entropy", "hostname", "interfaces", "machine_id", "resolver", "time_ns", "watchdog")

    def __init__(self, params: Params) -> None:
        """Take *params* apart; raises `Failure`."""
        self.hostname = hostname(params)
        self.time_ns = time_ns(params)
        try:
            self.entropy = binascii.a2b_base64(params.text("entropy", longest=2 * MAX_ENTROPY_BYTES))
        except ValueError:
            raise invalid("entropy", "is not base64") from None
        if not 1 <= len(self.entropy) <= MAX_ENTROPY_BYTES:
            raise invalid("entropy", f"must be 1 to {MAX_ENTROPY_BYTES} bytes")
        self.machine_id = params.text("machine_id", longest=32)
        if not _MACHINE_ID.fullmatch(self.machine_id):
            raise invalid("machine_id", "must be 32 hex digits in lower case")
        self.interfaces = params.array("interfaces", network.Interface, longest=64)
        self.resolver = network.Resolver(params.object("dns"))
        self.watchdog = watchdog.Setting(params.object("watchdog")) if params.has("watchdog") else None
        params.done()


def apply(identity: Identity) -> None:
    """Take *identity*.

    Raises OSError, and `Failure` when there are too few network devices. Parts of it may have been taken
    then, and it can be repeated.
    """
    set_clock(identity.time_ns)
    add_entropy(identity.entropy)
    syscalls.sethostname(identity.hostname)
    _write_etc("machine-id", f"{identity.machine_id}\n")
    _write_etc("hostname", f"{identity.hostname}\n")
    _write_etc("hosts", network.hosts_file(identity.hostname, identity.interfaces, identity.resolver))
    _write_etc("resolv.conf", identity.resolver.resolv_conf())
    network.apply(identity.interfaces)


def boot_id() -> str:
    """The kernel's boot id, which it makes up at the first reading: not before `add_entropy`."""
    return files.read("/proc/sys/kernel/random/boot_id")


def add_entropy(entropy: bytes) -> None:
    """Mix *entropy* into the kernel's generator, credit it, and let the generator start afresh from it.

    Without the last step a clone would go on with the template's keys until the next reseeding, up to five
    minutes later. Source: random(4).
    """
    fd = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, _POOL_INFO.pack(8 * len(entropy), len(entropy)) + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG, 0)
    finally:
        os.close(fd)


def _write_etc(name: str, content: str) -> None:
    """Write a file of `ETC` in its place: containers see the file itself, and what it says from now on."""
    flags = os.O_CREAT | os.O_TRUNC
    try:
        files.write(f"{ETC}/{name}", content, flags)
    except FileNotFoundError:
        os.makedirs(ETC, exist_ok=True)
        files.write(f"{ETC}/{name}", content, flags)
