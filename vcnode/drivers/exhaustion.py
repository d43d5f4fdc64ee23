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
}


def exhausted(exc: OSError) -> ResourceExhaustedError | None:
    """The error to raise in the place of *exc* when the host is short of something; None for any other."""
    message = _SHORT_OF.get(exc.errno or 0)
    return None if message is None else ResourceExhaustedError(message)
