"""Log files: what is kept, found again, rotated away, and said about what is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vcnode.drivers.base import LogPosition, LogRecord
from vcnode.drivers.logfiles import ContainerLog, LogFiles, Rotation, owner_of

ROTATION = Rotation(max_file_bytes=1000, max_files=3, min_free_bytes=0)


def record(
    offset: int,
    data: bytes,
    *,
    kind: Literal["stdout", "stderr", "end"] = "stdout",
    instance: int = 1,
    time_ns: int = 0,
) -> LogRecord:
    return LogRecord("c1", instance, kind, offset, time_ns or offset + 1, data)


def text(log: ContainerLog, position: int = 0, max_bytes: int = 1 << 20) -> bytes:
    chunk = log.read(position, max_bytes=max_bytes, max_pieces=1 << 20)
    return b"".join(piece.data for piece in chunk.pieces)


def test_what_was_appended_is_read_again_also_by_another_process(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path / "c1", ROTATION)
    log.append([record(0, b"one\n"), record(4, b"err\n", kind="stderr"), record(8, b"", kind="end")])
    for found in (log, ContainerLog(tmp_path / "c1", ROTATION)):
        chunk = found.read(0, max_bytes=100, max_pieces=10)
        assert [(p.kind, p.position, p.data) for p in chunk.pieces] == [
            ("stdout", 0, b"one\n"),
            ("stderr", 4, b"err\n"),
        ]
        assert (chunk.position, chunk.more, found.at_rest) == (8, False, True)
        assert found.guest_position == LogPosition(1, 8)


def test_what_comes_twice_is_kept_once(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path, ROTATION)
    log.append([record(0, b"abcd")])
    log.append([record(0, b"abcd"), record(2, b"cdef"), record(6, b"", kind="end")])
    log.append([record(6, b"", kind="end")])
    assert text(log) == b"abcdef"


def test_a_gap_is_counted_and_said(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path, ROTATION)
    log.append([record(0, b"abcd"), record(10, b"k")])
    assert log.lost_bytes == 6
    assert (
        text(log) == b"abcdvcnode: 6 bytes of output were dropped: they came faster than they were taken.\nk"
    )
    assert ContainerLog(tmp_path, ROTATION).lost_bytes == 6


def test_a_new_container_of_the_same_id_goes_on_in_the_same_log(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path, ROTATION)
    log.append([record(0, b"first "), record(6, b"", kind="end")])
    log.append([record(0, b"second", instance=2)])
    assert text(log) == b"first second"
    assert log.guest_position == LogPosition(2, 6)
    assert not log.at_rest


def test_files_are_rotated_and_the_oldest_removed(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path, ROTATION)
    line = b"x" * 99 + b"\n"
    for number in range(60):
        log.append([record(number * 100, line)])
    assert len(os.listdir(tmp_path)) == ROTATION.max_files
    chunk = log.read(0, max_bytes=1 << 20, max_pieces=1000)
    assert chunk.start == log.start > 0
    assert chunk.position == 6000
    again = ContainerLog(tmp_path, ROTATION)
    assert (again.start, again.end) == (log.start, log.end)
    again.append([record(6000, b"more\n")])
    assert text(again, 6000) == b"more\n"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_end_is_cut_off(tmp_path: Path, cut: int) -> None:
    log = ContainerLog(tmp_path, ROTATION)
    log.append([record(0, b"whole\n")])
    log.append([record(6, b"torn\n")])
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - cut)
    again = ContainerLog(tmp_path, ROTATION)
    expected = b"whole\n" if cut < 61 else b""
    assert text(again) == expected
    again.append([record(6, b"again\n")])
    assert text(ContainerLog(tmp_path, ROTATION)) == b"whole\nagain\n"


def test_a_full_disk_costs_output_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ContainerLog(tmp_path, ROTATION)
    log.append([record(0, b"before\n")])

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        log.append([record(7, b"lost\n")])
    assert log.lost_bytes == 5
    log.append([record(12, b"after\n")])
    assert text(log) == (
        b"before\nvcnode: 5 bytes or more of output were lost: No space left on device.\nafter\n"
    )
    greedy = Rotation(max_file_bytes=1000, max_files=3, min_free_bytes=1 << 60)
    nothing = ContainerLog(tmp_path / "other", greedy)
    nothing.append([record(0, b"x")])
    assert (nothing.end, nothing.lost_bytes) == (0, 1)


def test_tail_since_and_until(tmp_path: Path) -> None:
    log = ContainerLog(tmp_path, ROTATION)
    at = 0
    for number in range(40):
        line = f"line {number}\n".encode()
        log.append([record(at, line, time_ns=1000 + number)])
        at += len(line)
    assert text(log, log.tail(2)) == b"line 38\nline 39\n"
    assert text(log, log.tail(0)) == b""
    assert log.tail(10_000) == log.start
    assert text(log, log.since(1038)) == b"line 38\nline 39\n"
    assert log.since(99_999) == log.end
    part = log.read(log.since(1037), max_bytes=1000, max_pieces=100, until_ns=1039)
    assert b"".join(p.data for p in part.pieces) == b"line 37\nline 38\n"
    assert not part.more
    log.append([record(at, b"no end of line", time_ns=2000)])
    assert text(log, log.tail(1)) == b"no end of line"
    assert text(log, log.tail(2)) == b"line 39\nno end of line"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=30),
    step=st.integers(1, 400),
    tail=st.integers(0, 12),
)
def test_any_reading_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], step: int, tail: int
) -> None:
    rotation = Rotation(max_file_bytes=500, max_files=1000, min_free_bytes=0)
    log = ContainerLog(tmp_path_factory.mktemp("log"), rotation)
    whole = b""
    for line in lines:
        log.append([record(len(whole), line)])
        whole += line
    position, read = 0, b""
    while True:
        chunk = log.read(position, max_bytes=step, max_pieces=3)
        read += b"".join(p.data for p in chunk.pieces)
        position = chunk.position
        if not chunk.more:
            break
    assert read == whole
    parts = [p + b"\n" for p in whole.split(b"\n")]
    parts[-1] = parts[-1][:-1]
    if not parts[-1]:
        parts.pop()
    assert text(log, log.tail(tail)) == (b"".join(parts[-tail:]) if tail else b"")


async def test_logs_go_with_their_pods_and_are_part_of_the_audit(tmp_path: Path) -> None:
    files = LogFiles(tmp_path / "logs", ROTATION)
    assert list(await files.held("mark")) == []
    for pod_id in ("p1", "p2"):
        files.log(pod_id, "c1").append([record(0, b"x")])
    files.log("p1", "c2").append([record(0, b"x")])
    held = await files.held("mark")
    assert [(h.kind, h.vm_id) for h in held] == [("logs", owner_of("p1")), ("logs", owner_of("p2"))]
    files.delete("p1", "c1")
    assert sorted(os.listdir(tmp_path / "logs/p1")) == ["c2"]
    files.delete("p1")
    files.delete("p1")
    await files.free(held[1], timeout_s=1)
    assert os.listdir(tmp_path / "logs") == []
