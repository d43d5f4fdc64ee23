"""Starts programs by a launcher: the agent's side of `launcher`."""

from __future__ import annotations

import marshal
import os
import signal
import socket
from collections import deque
from contextlib import suppress

from vcnode.guest.agent.launcher import ANSWER, BEGUN, MAX_ORDER_BYTES, receive
from vcnode.guest.agent.loop import IN
from vcnode.guest.agent.spawn import Spawned

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vcnode.guest.agent.loop import Loop, Timer
    from vcnode.guest.agent.process import Plan

_END_S = 1.0
"""How long a launcher may take to end by itself, which it does at once unless it stands still."""


class Launcher:
    """A launcher, as the agent knows it.

    Args:
        loop: Where its answers are waited for.
        sock: To `launcher.serve`; it is closed here.
        spawned: The launcher's process.
        privileges: Those of what it starts; see `process.Plan.privileges`.
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, spawned: Spawned, privileges: tuple[object, ...]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._spawned = spawned
        self._privileges = privileges
        self._asked: deque[tuple[Callable[[Spawned | None], None], Callable[[int], None]]] = deque()
        self._running: dict[int, tuple[Spawned, Callable[[int], None]]] = {}
        self._limit: Timer | None = None
        self._ended: Callable[[], None] | None = None
        sock.setblocking(False)
        loop.watch(sock.fileno(), IN, self._on_answer)
        loop.watch(spawned.pidfd, IN, self._on_end)

    @property
    def pid(self) -> int:
        """The launcher's own process; 0 when it has ended."""
        return self._spawned.pid

    def launch(
        self,
        plan: Plan,
        stdio: tuple[int, int, int],
        begun: Callable[[Spawned | None], None],
        ended: Callable[[int], None],
    ) -> bool:
        """Start a program, if this is for a launcher.

        Args:
            plan: What to run.
            stdio: Descriptors of its stdin, stdout and stderr; they stay open in the caller.
            begun: Called, later, when the program runs, or with None: start it in another way.
            ended: Called afterwards with its wait status. The process is reaped already.

        Returns:
            Whether *begun* will be called.
        """
        if plan.terminal is not None or plan.spec.rlimits or plan.privileges != self._privileges:
            return False
        content = marshal.dumps((plan.spec.args, plan.env, plan.files, plan.spec.workdir))
        if len(content) > MAX_ORDER_BYTES or self._sock.fileno() < 0:
            return False
        try:
            socket.send_fds(self._sock, [content], stdio)
        except OSError:
            return False  # it has a lot to do, or has ended
        self._asked.append((begun, ended))
        return True

    def _on_answer(self, _events: int) -> None:
        while self._sock.fileno() >= 0:
            try:
                content, fds = receive(self._sock, ANSWER.size, 1)
            except BlockingIOError:
                return
            except OSError:
                content, fds = b"", []
            if not content:
                self._lost()
                return
            pid, status = ANSWER.unpack(content)
            if status != BEGUN:
                _, ended = self._running.pop(pid)
                ended(status)
                continue
            begun, ended = self._asked.popleft()
            if not pid:
                begun(None)
                continue
            spawned = Spawned(pid, fds[0], -1)
            self._running[pid] = spawned, ended
            begun(spawned)

    def _lost(self) -> None:
        """It says no more: what it was asked for goes another way, and what it started ends."""
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        while self._asked:
            self._asked.popleft()[0](None)
        while self._running:
            _, (spawned, ended) = self._running.popitem()
            with suppress(ProcessLookupError):  # its container has ended with all in it
                signal.pidfd_send_signal(spawned.pidfd, signal.SIGKILL)
            ended(signal.SIGKILL)

    def end(self, ended: Callable[[], None]) -> None:
        """Let it end, and call *ended* when it has: only then are the container's mounts free."""
        self._ended = ended
        if self._spawned.pid == 0:
            self._ended = None
            ended()
        elif self._limit is None:
            self._limit = self._loop.call_later(_END_S, self._kill)
            if self._sock.fileno() >= 0:
                self._sock.shutdown(socket.SHUT_WR)

    def _kill(self) -> None:
        if self._spawned.pid:
            signal.pidfd_send_signal(self._spawned.pidfd, signal.SIGKILL)

    def _on_end(self, _events: int) -> None:
        if self._spawned.pid == 0:
            return
        pid, _ = os.waitpid(self._spawned.pid, os.WNOHANG)
        if pid == 0:
            return
        self._on_answer(0)  # its last words
        self._loop.unwatch(self._spawned.pidfd)
        os.close(self._spawned.pidfd)
        os.close(self._spawned.status_fd)
        self._spawned.pid = 0
        if self._limit is not None:
            self._limit.cancel()
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()
