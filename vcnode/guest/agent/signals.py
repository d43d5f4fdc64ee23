"""What a signal would do to a process if it were not process 1 of its namespace.

The kernel drops signals to such a process that it has no handler for, even those from outside the namespace,
except SIGKILL and SIGSTOP. So ``sleep`` as a container's main process cannot be asked to end, and everybody
who stops it waits for the whole grace. Here it ends at once, as it would outside of a container.
Source: pid_namespaces(7) "The namespace init process"; signal(7); proc_pid_status(5), SigBlk, SigIgn, SigCgt.
"""

from __future__ import annotations

from signal import SIGCHLD, SIGCONT, SIGKILL, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH

_NOT_ENDING = frozenset({SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH})
"""Signals whose default action is to be ignored, to stop or to continue."""
_MASKS = ("SigBlk:", "SigIgn:", "SigCgt:")


def would_end(pid: int, number: int) -> bool:
    """Whether *number*, other than SIGKILL, has its default action in process *pid*, and that is to end it.

    False as well when the process is gone.
    """
    if number == SIGKILL or number in _NOT_ENDING:
        return False
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            return defaults(file.read(), number)
    except (FileNotFoundError, ProcessLookupError):
        return False


def defaults(status: str, number: int) -> bool:
    """Whether a process with this ``/proc/PID/status`` neither blocks, ignores nor handles *number*."""
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(_MASKS)]
    return len(masks) == len(_MASKS) and not any(mask >> (number - 1) & 1 for mask in masks)
