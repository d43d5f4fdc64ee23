"""What the host is short of, told apart from what is broken."""

from __future__ import annotations

import errno

from vcnode.errors import ResourceExhaustedError

_SHORT_OF = {
    errno.EMFILE: "The node agent has no file descriptors left; raise its limit (LimitNOFILE, ulimit -n).",
    errno.ENFILE: "The host has no file descriptors left; raise fs.file-max.",
    errno.ENOMEM: "The host has no memory left for this.",
    errno.EAGAIN: "The host has no processes left for the node agent; raise its limit (TasksMax, ulimit -u).",
    errno.ENOSPC: "The host has no space left for this.",
    errno.EDQUOT: "The node agent's disk quota is used up.",
    errno.ENOBUFS: "The kernel has no memory left for what it was sent over netlink.",
    errno.EXFULL: "The bridge has all ports that a kernel allows (1,023); put pods into named networks.",
}


def exhausted(exc: OSError) -> ResourceExhaustedError | None:
    """The error to raise in the place of *exc* when the host is short of something; None for any other."""
    return exhausted_by(exc.errno or 0)


def exhausted_by(number: int) -> ResourceExhaustedError | None:
    """As `exhausted`, of an errno that did not come with an OSError."""
    message = _SHORT_OF.get(number)
    return None if message is None else ResourceExhaustedError(message)
