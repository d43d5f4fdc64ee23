"""The event loop: descriptors, and timers that exist only while something waits for a limit.

Callbacks, no coroutines: asyncio would cost the guest 6 MiB. With nothing to do the process sleeps in
epoll_wait(2) without a time-out, so that an idle guest does not wake its host.
"""

from __future__ import annotations

import heapq
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN = select.EPOLLIN
OUT = select.EPOLLOUT
HUP = select.EPOLLHUP
EDGE = select.EPOLLET


class Timer:
    """A call that is due later. `cancel` is idempotent and may come after it has run."""

    __slots__ = ("_callback", "deadline")

    def __init__(self, deadline: float, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self._callback: Callable[[], None] | None = callback

    @property
    def pending(self) -> bool:
        """Whether it will still run."""
        return self._callback is not None

    def cancel(self) -> None:
        """Do not run it."""
        self._callback = None

    def run(self) -> None:
        """Run it, once."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Loop:
    """Calls back when a descriptor is ready or a time has come.

    A callback must put up with being called in vain: a descriptor that was closed and its number reused
    within one round gets the event of its predecessor. So all descriptors are non-blocking, and whoever is
    told of a child's end asks for it with WNOHANG.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_count = 0
        self._stopped = False
        self.before_wait: Callable[[], None] | None = None
        """Called each time before the loop sleeps: what a round has piled up goes out at once."""

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(ready_events)`` whenever *fd* is ready for one of *events*."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forget *fd*; to be called before it is closed. Idempotent."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call *callback* in *delay_s* seconds."""
        timer = Timer(time.monotonic() + delay_s, callback)
        self._timer_count += 1
        heapq.heappush(self._timers, (timer.deadline, self._timer_count, timer))
        return timer

    def stop(self) -> None:
        """Let `run` return after the present callback."""
        self._stopped = True

    def close(self) -> None:
        """Close the loop's own descriptor."""
        self._epoll.close()

    def run(self) -> None:
        """Serve until `stop`. An exception that a callback lets out ends the loop: it is a bug."""
        self._stopped = False
        while not self._stopped:
            if self.before_wait is not None:
                self.before_wait()
            for fd, events in self._epoll.poll(self._timeout_s()):
                if (callback := self._callbacks.get(fd)) is not None:
                    callback(events)
                if self._stopped:
                    return
            self._run_timers()

    def _timeout_s(self) -> float | None:
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].run()
