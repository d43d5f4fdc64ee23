"""Capabilities: their names, the default set of a container, and how a process gives the others up."""

from __future__ import annotations

from vcnode.guest.agent import syscalls
from vcnode.guest.agent.params import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# In the order of their numbers; include/uapi/linux/capability.h
NAMES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
_BITS = {name: 1 << number for number, name in enumerate(NAMES)}
ALL = (1 << len(NAMES)) - 1

# moby: profiles of containerd and Docker, oci/caps/defaults.go; the same 14 that runtimes of the OCI use.
DEFAULT = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)


def mask(names: Iterable[str], path: str = "process.capabilities") -> int:
    """The bits of *names*.

    Raises:
        Failure: ``invalid_argument``; a name is not known.
    """
    bits = 0
    for name in names:
        if (bit := _BITS.get(name)) is None:
            raise invalid(path, f"{name!r} is no capability")
        bits |= bit
    return bits


def limit_bounding_set(allowed: int) -> None:
    """Give up, for ever, what is not in *allowed*: not even setuid root brings it back. Needs CAP_SETPCAP."""
    dropped = ALL & ~allowed
    for number in range(len(NAMES)):
        if dropped & 1 << number:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)


def limit(allowed: int) -> None:
    """Leave the caller with *allowed* and nothing that a program could inherit beyond it.

    The inheritable set stays empty (CVE-2022-24769), and so does the ambient one: a program run by a user
    other than root starts with no capability at all, whatever the bounding set would let it gain.
    """
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    syscalls.capset(allowed, allowed, 0)
