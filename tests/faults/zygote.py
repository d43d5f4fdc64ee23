"""Forks node agents from a process that has imported everything: each is a real process, and starts at once.

Started by `tests.faults.lives`. Reads one JSON object per line, with ``settings``, ``log``, ``arms``: a path
or null. Answers each with ``{"pid": N}``; when a node agent ends, it writes ``{"pid": N, "status": N}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import select
import signal
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from vcnode import logs, node
from vcnode.drivers.failpoints import FailPoints
from vcnode.drivers.faults import FaultPlan, Rule
from vcnode.handlers import dispatch
from vcnode.settings import Settings


class Armed(FailPoints):
    """Failpoints that a test sets while the node agent runs: SIGUSR1, and the rules in a file, which goes."""

    plan: Path

    def __init__(self, rules: Iterable[Rule]) -> None:
        super().__init__(rules)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._read)

    def __bool__(self) -> bool:
        return True

    def _read(self) -> None:
        self.arm(FaultPlan.parse(self.plan.read_text()).rules)
        self.plan.unlink()


def live(request: dict[str, object]) -> int:
    """In the child: be a node agent until a signal ends it."""
    os.setsid()
    # Made at import: without this the ids of commands that came without one would come again in each life.
    dispatch._RUN = secrets.token_hex(12)
    log = os.open(str(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["arms"]:
        Armed.plan = Path(str(request["arms"]))
        node.FailPoints = Armed  # type: ignore[misc]
    try:
        logs.configure(form="text", level="info", stream=sys.stderr)
        asyncio.run(node.run(Settings(**request["settings"])))  # type: ignore[arg-type]
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def reap() -> None:
    """Tell of every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        print(json.dumps({"pid": pid, "status": status}), flush=True)


def main() -> None:
    """Fork until there is no more to read."""
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    buffer = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            reap()
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if not (pid := os.fork()):
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os._exit(live(json.loads(line)))
                print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
