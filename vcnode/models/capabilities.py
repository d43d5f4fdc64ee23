"""Capabilities of Linux, as containers and commands may have them."""

from __future__ import annotations

DEFAULT_CAPABILITIES: tuple[str, ...] = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""What a container gets when its command names none. Source: containerd oci/spec.go, moby oci/caps."""

ALL_CAPABILITIES: tuple[str, ...] = tuple(
    sorted(
        (
            *DEFAULT_CAPABILITIES,
            *(
                f"CAP_{name}"
                for name in [
                    "AUDIT_CONTROL",
                    "AUDIT_READ",
                    "BLOCK_SUSPEND",
                    "BPF",
                    "CHECKPOINT_RESTORE",
                    "DAC_READ_SEARCH",
                    "IPC_LOCK",
                    "IPC_OWNER",
                    "LEASE",
                    "LINUX_IMMUTABLE",
                    "MAC_ADMIN",
                    "MAC_OVERRIDE",
                    "NET_ADMIN",
                    "NET_BROADCAST",
                    "PERFMON",
                    "SYSLOG",
                    "SYS_ADMIN",
                    "SYS_BOOT",
                    "SYS_MODULE",
                    "SYS_NICE",
                    "SYS_PACCT",
                    "SYS_PTRACE",
                    "SYS_RAWIO",
                    "SYS_RESOURCE",
                    "SYS_TIME",
                    "SYS_TTY_CONFIG",
                    "WAKE_ALARM",
                ]
            ),
        )
    )
)
"""Every capability of Linux 5.9 and later. Source: capabilities(7)."""
