"""When probes are tried, and what follows: with time that the test lets pass."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from vcnode.guest.health import Health, ProbeSpec


class FakeTimer:
    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._count = 0

    def call_later(self, delay_s: float, callback: Callable[[], None], /) -> FakeTimer:
        timer = FakeTimer(self.now + delay_s, callback)
        self._count += 1
        heapq.heappush(self._timers, (timer.at, self._count, timer))
        return timer

    @property
    def armed(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._timers)

    def go(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            _, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                self.now, callback, timer.callback = max(self.now, timer.at), timer.callback, None
                callback()
        self.now = end


class Rig:
    """A container with probes whose outcomes the test sets: None, a reason, or "hang"."""

    def __init__(self, **probes: ProbeSpec) -> None:
        self.time = FakeTime()
        self.outcomes: dict[str, str | None] = {}
        self.tries: list[tuple[float, str]] = []
        self.cancelled = 0
        self.changes: list[tuple[float, bool]] = []
        self.failures: list[str] = []
        self.health = Health(
            probes,
            timers=self.time,
            now=lambda: self.time.now,
            attempt=self._attempt,
            changed=lambda: self.changes.append((self.time.now, self.health.ready)),
            failed=self.failures.append,
        )

    def _attempt(self, spec: ProbeSpec, done: Callable[[str | None], None]) -> Callable[[], None]:
        self.tries.append((self.time.now, spec.action))
        outcome = self.outcomes.get(spec.action)

        def cancel() -> None:
            self.cancelled += 1

        if outcome != "hang":
            done(outcome)
        return cancel


def probe(name: str, **changes: float) -> ProbeSpec:
    given = {
        "initial_delay_s": 0.0, "period_s": 10.0, "timeout_s": 1.0,
        "success_threshold": 1, "failure_threshold": 3,
    }  # fmt: skip
    return ProbeSpec(name, **(given | changes))  # type: ignore[arg-type]


def test_without_probes_a_container_is_ready_and_nothing_is_armed() -> None:
    rig = Rig()
    assert not rig.health.ready
    rig.health.start()
    assert rig.health.ready
    assert rig.time.armed == 0
    assert rig.changes == []


def test_readiness_follows_its_thresholds() -> None:
    rig = Rig(readiness=probe("r", initial_delay_s=5, success_threshold=2, failure_threshold=2))
    rig.health.start()
    assert not rig.health.ready
    rig.time.go(20)
    assert rig.tries == [(5, "r"), (15, "r")]
    assert rig.changes == [(15, True)]
    rig.outcomes["r"] = "down"
    rig.time.go(10)
    assert rig.health.ready
    rig.time.go(10)
    assert rig.changes[-1] == (35, False)
    rig.outcomes["r"] = None
    rig.time.go(20)
    assert rig.changes[-1] == (55, True)
    assert rig.failures == []


def test_the_startup_probe_holds_the_others_back() -> None:
    rig = Rig(startup=probe("s", period_s=2), readiness=probe("r"), liveness=probe("l", initial_delay_s=3))
    rig.outcomes["s"] = "not yet"
    rig.health.start()
    rig.time.go(3)
    assert [name for _, name in rig.tries] == ["s", "s"]
    rig.outcomes["s"] = None
    rig.time.go(1)
    assert rig.health.started
    rig.time.go(0)
    assert rig.changes == [(4, False), (4, True)]
    rig.time.go(10)
    assert (7, "l") in rig.tries
    assert [at for at, name in rig.tries if name == "s"] == [0, 2, 4]


def test_a_startup_that_fails_ends_the_container_and_probing() -> None:
    rig = Rig(startup=probe("s", failure_threshold=2), liveness=probe("l"))
    rig.outcomes["s"] = "exit code 1"
    rig.health.start()
    rig.time.go(100)
    assert rig.failures == ["Its startup probe failed: exit code 1"]
    assert rig.time.armed == 0
    rig.health.start()
    rig.time.go(10)
    assert rig.failures[1:] == ["Its startup probe failed: exit code 1"]


def test_a_probe_that_hangs_is_given_up_at_its_time_limit() -> None:
    rig = Rig(liveness=probe("l", period_s=5, timeout_s=2))
    rig.outcomes["l"] = "hang"
    rig.health.start()
    rig.time.go(11.9)
    assert rig.cancelled == 2
    rig.time.go(0.2)
    assert rig.failures == ["Its liveness probe failed: no answer within 2 s"]
    assert rig.cancelled == 3
    assert rig.time.armed == 0


def test_a_time_limit_longer_than_the_period_delays_the_next_try() -> None:
    rig = Rig(liveness=probe("l", period_s=1, timeout_s=5, failure_threshold=9))
    rig.outcomes["l"] = "hang"
    rig.health.start()
    rig.time.go(11)
    assert [at for at, _ in rig.tries] == [0, 5, 10]


def test_nothing_is_tried_while_the_container_is_paused() -> None:
    rig = Rig(liveness=probe("l", period_s=5, timeout_s=4))
    rig.outcomes["l"] = "hang"
    rig.health.start()
    rig.time.go(1)
    rig.health.pause()
    assert rig.cancelled == 1
    assert rig.time.armed == 0
    rig.time.go(1000)
    rig.outcomes["l"] = None
    rig.health.resume()
    rig.time.go(4.9)
    assert len(rig.tries) == 1
    rig.time.go(0.1)
    assert len(rig.tries) == 2
    assert rig.failures == []


steps = st.lists(
    st.tuples(
        st.sampled_from(["start", "stop", "pause", "resume", "go"]),
        st.sampled_from([None, "bad", "hang"]),
        st.floats(0, 30),
    ),
    max_size=30,
)


@given(steps)
def test_whatever_happens_only_running_containers_are_probed(
    acts: list[tuple[str, str | None, float]],
) -> None:
    rig = Rig(
        startup=probe("s", period_s=1), readiness=probe("r", period_s=2), liveness=probe("l", period_s=3)
    )
    running = False
    for act, outcome, seconds in acts:
        rig.outcomes = dict.fromkeys("srl", outcome)
        failures = len(rig.failures)
        tries = len(rig.tries)
        if act == "go":
            rig.time.go(seconds)
        else:
            getattr(rig.health, act)()
            running = {"start": True, "stop": False}.get(act, running)
        if len(rig.failures) > failures:
            running = False
            assert len(rig.failures) == failures + 1
        if not running:
            assert rig.time.armed == 0
            assert not rig.health.ready
            assert not rig.health.started
        if act != "go":
            assert len(rig.tries) == tries
        assert rig.health.started or not rig.health.ready
    rig.health.stop()
    assert rig.time.armed == 0
