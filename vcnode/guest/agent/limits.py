"""Resource limits of a process, as in setrlimit(2)."""

from __future__ import annotations

import resource

from vcnode.guest.agent.params import checked_integer, encoded, invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Rlimit = tuple[int, int, int]

# include/uapi/asm-generic/resource.h; by name without RLIMIT_ in lower case.
_NUMBERS = {
    "cpu": 0,
    "fsize": 1,
    "data": 2,
    "stack": 3,
    "core": 4,
    "rss": 5,
    "nproc": 6,
    "nofile": 7,
    "memlock": 8,
    "as": 9,
    "locks": 10,
    "sigpending": 11,
    "msgqueue": 12,
    "nice": 13,
    "rtprio": 14,
    "rttime": 15,
}
_NAMES = {number: name for name, number in _NUMBERS.items()}
NOFILE = _NUMBERS["nofile"]
DEFAULT_NOFILE = (1024, 524_288)
"""Open files of a process unless it asks otherwise: what systemd gives to services."""
AGENT_NOFILE = 524_288
"""Open files of the agent, which holds up to six for each process that it started."""

_MOST = (1 << 63) - 1


def parse(item: Any, path: str) -> Rlimit:
    """Check one ``[name, soft, hard]``; -1 is no limit. Gives (number, soft, hard)."""
    if type(item) is not list or len(item) != 3:
        raise invalid(path, "must be [name, soft, hard]")
    name = encoded(item[0], path, 16).decode()
    if (number := _NUMBERS.get(name)) is None:
        raise invalid(path, f"{name!r} is no resource limit")
    soft = checked_integer(item[1], path, -1, _MOST)
    hard = checked_integer(item[2], path, -1, _MOST)
    if hard != -1 and not 0 <= soft <= hard:
        raise invalid(path, f"the soft limit {soft} is above the hard limit {hard}")
    return number, soft, hard


def apply(rlimits: tuple[Rlimit, ...]) -> None:
    """Set the caller's limits; those of open files to `DEFAULT_NOFILE` unless they are among *rlimits*.

    Raises:
        Failure: ``invalid_argument``; the kernel refused one.
    """
    soft, most = DEFAULT_NOFILE
    hard = min(most, resource.getrlimit(NOFILE)[1])
    resource.setrlimit(NOFILE, (min(soft, hard), hard))
    for number, soft, hard in rlimits:
        try:
            resource.setrlimit(number, (soft, hard))
        except (ValueError, OSError) as exc:
            raise invalid("process.rlimits", f"{_NAMES[number]} cannot be {soft}:{hard} ({exc})") from exc


def raise_own() -> None:
    """Let the agent open as many files as it may need."""
    resource.setrlimit(NOFILE, (AGENT_NOFILE, AGENT_NOFILE))
