"""Probes of one container: when each is tried, and what follows from the outcomes. No I/O.

::

    start ---> startup ---- passed ----> readiness (again and again): ready, not ready
                  |                      liveness  (again and again)
                  | failed                   | failed
                  +------> give up <---------+

Without a startup probe the other two begin at once; without a readiness probe a container is ready as soon as
it has started. An attempt that takes too long is cancelled and has failed. Nothing is armed while there is no
probe to try, so that an idle guest does not wake its host.

Both the guest agent and the mock agent use this, each with timers and attempts of its own.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Cancellable(Protocol):
        """A timer."""

        def cancel(self) -> None:
            """Do not run it."""

    class Timers(Protocol):
        """An event loop, ours or asyncio's."""

        def call_later(self, delay_s: float, callback: Callable[[], None], /) -> Cancellable:
            """Call *callback* in *delay_s* seconds."""

    Done = Callable[[str | None], None]
    Attempt = Callable[["ProbeSpec", Done], Callable[[], None]]

STARTUP, READINESS, LIVENESS = "startup", "readiness", "liveness"
NAMES = (STARTUP, READINESS, LIVENESS)


class ProbeSpec:
    """What to try and how often; see contracts/guest-protocol.md, Probes."""

    __slots__ = (
        "action",
        "failure_threshold",
        "initial_delay_s",
        "period_s",
        "success_threshold",
        "timeout_s",
    )

    def __init__(
        self,
        action: Any,
        *,
        initial_delay_s: float,
        period_s: float,
        timeout_s: float,
        success_threshold: int,
        failure_threshold: int,
    ) -> None:
        self.action = action
        self.initial_delay_s = initial_delay_s
        self.period_s = period_s
        self.timeout_s = timeout_s
        self.success_threshold = success_threshold
        self.failure_threshold = failure_threshold


class Health:
    """The health of a container.

    Args:
        probes: By name; those that are absent pass.
        timers: Where to wait.
        now: Seconds on a clock that does not jump.
        attempt: Begins one try; calls back once with None or with why it failed (perhaps at once), and never
            after the function that it returns, which gives the try up, was called.
        changed: `started` or `ready` is another.
        failed: The container is to be ended, for this reason. No probe is tried after that.
    """

    def __init__(
        self,
        probes: dict[str, ProbeSpec],
        *,
        timers: Timers,
        now: Callable[[], float],
        attempt: Attempt,
        changed: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        self._probers = {
            name: _Prober(self, name, spec, timers, now, attempt) for name, spec in probes.items()
        }
        self._changed = changed
        self._failed = failed
        self._running = False
        self.started = False
        """Whether the startup probe has passed, or there is none."""
        self.ready = False
        """Whether the container is ready, by its probes."""

    def start(self) -> None:
        """The main process runs. What `started` and `ready` are now is no news."""
        self._running = True
        self.started = STARTUP not in self._probers
        self.ready = self.started and READINESS not in self._probers
        for prober in self._probers.values():
            prober.reset()
        self._begin()

    def _begin(self) -> None:
        for prober in self._wanted():
            prober.arm(prober.spec.initial_delay_s)

    def _wanted(self) -> list[_Prober]:
        """The probers that are to be tried now."""
        names = (READINESS, LIVENESS) if self.started else (STARTUP,)
        return [self._probers[name] for name in names if name in self._probers] if self._running else []

    def stop(self) -> None:
        """The main process has ended, or is about to. Idempotent."""
        self._running = self.started = self.ready = False
        for prober in self._probers.values():
            prober.disarm()

    def pause(self) -> None:
        """The container stands still: no probe is tried."""
        for prober in self._probers.values():
            prober.disarm()

    def resume(self) -> None:
        """The container goes on: each probe is tried a period from now."""
        for prober in self._wanted():
            prober.arm(prober.spec.period_s)

    def verdict(self, name: str, why: str | None) -> None:
        """A probe has passed (None) or failed as often in a row as it takes."""
        if name == READINESS:
            ready = why is None
            if self.ready is not ready:
                self.ready = ready
                self._changed()
        elif why is not None:
            self.stop()
            self._failed(f"Its {name} probe failed: {why}")
        elif name == STARTUP and not self.started:
            self._probers[STARTUP].disarm()
            self.started = True
            self.ready = READINESS not in self._probers
            self._begin()
            self._changed()


class _Prober:
    """One probe and its counters."""

    def __init__(
        self,
        health: Health,
        name: str,
        spec: ProbeSpec,
        timers: Timers,
        now: Callable[[], float],
        attempt: Attempt,
    ) -> None:
        self.spec = spec
        self._health = health
        self._name = name
        self._timers = timers
        self._now = now
        self._attempt = attempt
        self._timer: Cancellable | None = None
        self._limit: Cancellable | None = None
        self._cancel: Callable[[], None] | None = None
        self._trying = 0
        """Number of the attempt that is under way; 0: none is."""
        self._tries = 0
        self._begun = 0.0
        self._successes = 0
        self._failures = 0

    def reset(self) -> None:
        """Forget all outcomes."""
        self._successes = self._failures = 0

    def arm(self, delay_s: float) -> None:
        """Try in *delay_s* seconds."""
        self.disarm()
        self._timer = self._timers.call_later(delay_s, self._try)

    def disarm(self) -> None:
        """Try no more; give up what is under way. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._end_attempt()

    def _end_attempt(self) -> None:
        self._trying = 0
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def _try(self) -> None:
        self._timer = None
        self._begun = self._now()
        self._tries += 1
        number = self._trying = self._tries
        self._limit = self._timers.call_later(self.spec.timeout_s, self._too_late)
        cancel = self._attempt(self.spec, lambda why: self._done(number, why))
        if self._trying == number:
            self._cancel = cancel

    def _too_late(self) -> None:
        number = self._trying
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()
        self._done(number, f"no answer within {self.spec.timeout_s:g} s")

    def _done(self, number: int, why: str | None) -> None:
        if not number or self._trying != number:
            return
        self._cancel = None
        self._end_attempt()
        if why is None:
            self._successes, self._failures = self._successes + 1, 0
            decided = self._successes >= self.spec.success_threshold
        else:
            self._successes, self._failures = 0, self._failures + 1
            decided = self._failures >= self.spec.failure_threshold
        self._timer = self._timers.call_later(
            max(0.0, self._begun + self.spec.period_s - self._now()), self._try
        )
        if decided:
            self._health.verdict(self._name, why)
