"""The processes of a container, from /proc. Whatever is read there the container may have made up."""

from __future__ import annotations

import os
import time

from vcnode.guest.agent import users

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vcnode.guest.agent.loop import Loop

MAX_PROCESSES = 512
MAX_ARGS_BYTES = 1024
"""Bytes of the arguments of one process."""
_AT_ONCE = 16
"""Processes looked at before the loop may serve others."""


class Listing:
    """Reads the processes *pids* a few at a time; *done* gets the result of ``list_processes``.

    Args:
        loop: Where to go on.
        pids: All of them, in any order.
        root: The container's root, for the names of users.
        limit: Most to describe.
        done: Called once.
        not_before_ns: When the container started. Its first process may have stood ready long before.
    """

    def __init__(
        self,
        loop: Loop,
        pids: list[int],
        root: str,
        limit: int,
        done: Callable[[dict[str, Any]], None],
        *,
        not_before_ns: int = 0,
    ) -> None:
        self._loop = loop
        self._left = sorted(pids)[:limit]
        self._total = len(pids)
        self._users = _user_names(root)
        self._done = done
        self._not_before_ns = not_before_ns
        self._found: list[dict[str, Any]] = []
        self._boot_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._go_on()

    def _go_on(self) -> None:
        now, self._left = self._left[:_AT_ONCE], self._left[_AT_ONCE:]
        for pid in now:
            try:
                described = self._describe(pid)
            except (OSError, ValueError, IndexError, KeyError):
                self._total -= 1  # it has ended meanwhile
            else:
                self._found.append(described)
        if self._left:
            self._loop.call_later(0, self._go_on)
        else:
            self._done({"processes": self._found, "total": max(self._total, len(self._found))})

    def _describe(self, pid: int) -> dict[str, Any]:
        stat = _read(pid, "stat", 4096)
        status = fields(_read(pid, "status", 8192))
        cmdline = _read(pid, "cmdline", MAX_ARGS_BYTES + 1)
        # proc_pid_stat(5); the name in parentheses may hold anything, also parentheses.
        name_end = stat.rfind(b")")
        words = stat[name_end + 2 :].split()
        uid = int(status[b"Uid"].split()[1])
        return {
            "pid": pid,
            "ppid": int(words[1]),
            "container_pid": int(status[b"NSpid"].split()[-1]),
            "uid": uid,
            "user": self._users.get(uid),
            "state": words[0].decode("ascii", "replace"),
            "cpu_ms": (int(words[11]) + int(words[12])) * 1000 // _TICKS,
            "rss_bytes": int(status.get(b"VmRSS", b"0").split()[0]) * 1024,
            "started_at_ns": max(
                self._not_before_ns, self._boot_ns + int(words[19]) * 1_000_000_000 // _TICKS
            ),
            "name": text(stat[stat.find(b"(") + 1 : name_end]),
            "args": args(cmdline[:MAX_ARGS_BYTES]),
            "args_truncated": len(cmdline) > MAX_ARGS_BYTES,
        }


_TICKS = os.sysconf("SC_CLK_TCK")


def text(raw: bytes) -> str:
    """Bytes as text that JSON can hold."""
    return raw.decode("utf-8", "replace")


def args(cmdline: bytes) -> list[str]:
    """The arguments in a ``/proc/PID/cmdline``, each ended by NUL."""
    return [text(word) for word in cmdline.rstrip(b"\0").split(b"\0")] if cmdline else []


def fields(status: bytes) -> dict[bytes, bytes]:
    """The lines of a ``/proc/PID/status``."""
    return {name: value for name, _, value in (line.partition(b":") for line in status.splitlines())}


def _read(pid: int, name: str, most: int) -> bytes:
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)


def _user_names(root: str) -> dict[int, str]:
    try:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return {}  # the container ends just now
    try:
        return users.names(users.read_database(fd, "etc/passwd"))
    finally:
        os.close(fd)
