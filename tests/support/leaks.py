"""What a test left behind: processes, descriptors, mounts. Looked at after each test, fixtures included."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_COUNTED = ("socket:", "pipe:", "/tmp/", "/run/", "/dev/net/")
"""Descriptors that only what is tested can have opened; others come and go with the interpreter."""

expected_children: set[int] = set()
"""Processes that live longer than one test on purpose (servers of session fixtures)."""
expected_descriptors: set[str] = set()
"""Descriptors, by link target, that live longer than one test on purpose."""
directories: set[Path] = set()
"""Temporary directories of this run of the tests; other runs have mounts of their own."""


@dataclass(frozen=True)
class Held:
    """What this process held at one moment."""

    children: frozenset[int] = field(default_factory=lambda: frozenset(children()))
    descriptors: frozenset[tuple[int, str]] = field(default_factory=lambda: frozenset(descriptors()))
    mounts: frozenset[str] = field(default_factory=lambda: frozenset(mounts()))


def children() -> set[int]:
    """Child processes of this one, zombies included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(int(pid) for pid in (task / "children").read_text().split())
        except FileNotFoundError:  # a thread that has ended meanwhile
            continue
    return found


def descriptors() -> Iterator[tuple[int, str]]:
    """Open descriptors that count, with what they point to."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target.startswith(_COUNTED) and " (deleted)" not in target:
            yield int(entry.name), target


def mounts() -> set[str]:
    """Mount points below the temporary directories of this run."""
    points = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return {point for point in points if any(Path(point).is_relative_to(place) for place in directories)}


def since(before: Held) -> list[str]:
    """What is held now and was not held *before*, in words; empty when nothing leaked."""
    now = Held()
    if now.descriptors - before.descriptors:
        gc.collect()  # what only waited for the collector is not a leak
        now = Held()
    leaks = [f"process {pid}: {_command(pid)}" for pid in now.children - before.children - expected_children]
    leaks += [
        f"descriptor {number}: {target}"
        for number, target in sorted(now.descriptors - before.descriptors)
        if target not in expected_descriptors
    ]
    leaks += [f"mount {point}" for point in sorted(now.mounts - before.mounts)]
    return leaks


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "(gone)"
    return words.strip() or "(zombie)"
