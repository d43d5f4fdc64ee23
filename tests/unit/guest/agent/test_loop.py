"""The event loop and its small companions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vcnode.guest.agent import execs, port
from vcnode.guest.agent.loop import IN, Loop
from vcnode.guest.agent.undo import Undo


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_descriptor_calls_back_while_it_is_watched(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[bytes] = []

    def read(_events: int) -> None:
        seen.append(os.read(pipe[0], 1))
        if seen == [b"a", b"b"]:
            loop.unwatch(pipe[0])
            loop.unwatch(pipe[0])
            loop.call_later(0, loop.stop)

    loop.watch(pipe[0], IN, read)
    os.write(pipe[1], b"abc")
    loop.run()
    assert seen == [b"a", b"b"]


def test_timers_run_in_order_and_not_when_cancelled(loop: Loop) -> None:
    seen: list[str] = []
    loop.call_later(0.002, lambda: seen.append("second"))
    loop.call_later(0.001, lambda: seen.append("first"))
    cancelled = loop.call_later(0.0015, lambda: seen.append("never"))
    cancelled.cancel()
    cancelled.cancel()
    loop.call_later(0.003, loop.stop)
    loop.run()
    assert seen == ["first", "second"]
    assert not cancelled.pending


def test_without_timers_it_would_sleep_for_ever(loop: Loop) -> None:
    assert loop._timeout_s() is None
    loop.call_later(5, loop.stop).cancel()
    assert loop._timeout_s() is None


def test_what_a_round_piled_up_is_handled_before_the_sleep(loop: Loop) -> None:
    calls: list[str] = []
    loop.before_wait = lambda: calls.append("wait")
    loop.call_later(0, lambda: (calls.append("timer"), loop.stop()))  # type: ignore[func-returns-value]
    loop.run()
    assert calls == ["wait", "timer"]


def test_undo_runs_backwards_and_keeps_what_failed() -> None:
    done: list[int] = []
    broken = True

    def fails() -> None:
        if broken:
            raise OSError(16, "Device or resource busy")
        done.append(2)

    undo = Undo()
    undo.push("one", lambda: done.append(1))
    undo.push("two", fails)
    undo.push("three", lambda: done.append(3))
    assert undo.run() == ["cannot two: [Errno 16] Device or resource busy"]
    assert done == [3, 1]
    broken = False
    assert undo.run() == []
    assert undo.run() == []
    assert done == [3, 1, 2]


@pytest.mark.parametrize(
    ("line", "session"),
    [
        (b"12 (sh) S 1 12 11 0 -1 4194304", 11),
        (b"12 (a) b) R (c) S 1 12 99 0", 99),
        (b"12 (sh) Z 1 12 11 0", -1),
        (b"", -1),
        (b"12 (sh) S 1", -1),
    ],
)
def test_the_session_of_a_process(line: bytes, session: int) -> None:
    assert execs.session_of(line) == session


def test_the_session_of_this_process_has_this_process() -> None:
    assert os.getpid() in execs.session_members(os.getsid(0))


def test_a_port_is_found_by_its_name(tmp_path: Path) -> None:
    for entry, name in (("vport0p1", "other\n"), ("vport0p2", "vcnode.agent.0\n")):
        (tmp_path / entry).mkdir()
        (tmp_path / entry / "name").write_text(name)
    (tmp_path / "vport0p0").mkdir()  # its name has not come yet
    assert port.find(sys_ports=str(tmp_path)) == "/dev/vport0p2"
    assert port.find("nobody", str(tmp_path)) is None
    assert port.find(sys_ports=str(tmp_path / "absent")) is None
