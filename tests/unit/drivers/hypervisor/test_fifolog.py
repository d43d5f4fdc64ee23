"""vcnode.drivers.hypervisor.qemu.fifolog: whatever is written into the FIFO, the log stays bounded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu.fifolog import TAIL_BYTES, BoundedFile, FifoLog, last_lines, printable


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
async def make_log(fifo: Path, tmp_path: Path) -> AsyncIterator[Callable[[], FifoLog]]:
    made: list[FifoLog] = []

    def make() -> FifoLog:
        made.append(FifoLog(fifo, tmp_path / "log", max_bytes=100_000))
        return made[-1]

    yield make
    for log in made:
        log.close()


@pytest.fixture
def writer(fifo: Path, make_log: Callable[[], FifoLog]) -> Iterator[int]:
    """A writer that opens as QEMU does, so that the FIFO outlives its reader."""
    fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    yield fd
    os.close(fd)


async def heard(log: FifoLog, text: str) -> None:
    async with asyncio.timeout(10):
        while text not in log.text():
            event = asyncio.Event()
            log._on_data = event.set
            await event.wait()


async def test_what_is_written_is_logged_as_it_comes(make_log, writer: int, tmp_path: Path):
    log = make_log()
    os.write(writer, b"one\n")
    await heard(log, "one")
    os.write(writer, b"two\n")
    await heard(log, "two")
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


async def test_a_flood_is_read_in_turns_and_nothing_is_lost(make_log, writer: int, tmp_path: Path):
    log = make_log()
    os.write(writer, bytes(65_536))
    log._readable()
    os.write(writer, b"after\n")
    assert "after" not in log.text()  # it rests
    await heard(log, "after")
    assert (tmp_path / "log").stat().st_size == 65_542


async def test_what_came_while_nobody_read_is_read_later(make_log, writer: int):
    make_log().close()
    os.write(writer, b"meanwhile\n")
    await heard(make_log(), "meanwhile")


async def test_the_tail_of_an_earlier_reader_is_remembered(make_log, writer: int):
    first = make_log()
    os.write(writer, b"early\n")
    await heard(first, "early")
    first.close()
    assert make_log().text() == "early"


async def test_drain_takes_everything_at_once(make_log, writer: int):
    log = make_log()
    os.write(writer, b"x" * 65_000 + b"\nend\n")
    log.drain()
    assert log.text().endswith("\nend")


async def test_the_memory_of_the_tail_is_bounded(make_log, writer: int):
    log = make_log()
    for _ in range(5):
        os.write(writer, b"y" * 65_536)
        log.drain()
    assert len(log.text()) == TAIL_BYTES


async def test_close_is_idempotent_and_ends_the_reading(make_log, writer: int, tmp_path: Path):
    log = make_log()
    log.close()
    log.close()
    os.write(writer, b"unheard")
    log.drain()
    assert log.text() == ""


async def test_a_symbolic_link_is_not_followed(tmp_path: Path):
    (tmp_path / "link").symlink_to("/dev/null")
    with pytest.raises(OSError, match="symbolic links"):
        FifoLog(tmp_path / "link", tmp_path / "log", max_bytes=100)


def test_a_file_is_rotated_and_one_older_is_kept(tmp_path: Path):
    file = BoundedFile(tmp_path / "log", max_bytes=10)
    for number in range(5):
        file.write(b"%d234567" % number)
    file.close()
    assert (tmp_path / "log").read_bytes() == b"4234567"
    assert (tmp_path / "log.1").read_bytes() == b"3234567"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_chunk_larger_than_the_bound_keeps_its_end(tmp_path: Path):
    file = BoundedFile(tmp_path / "log", max_bytes=10)
    file.write(b"0123456789abcdef")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"6789abcdef"


def test_a_file_that_exists_counts(tmp_path: Path):
    (tmp_path / "log").write_bytes(b"12345678")
    file = BoundedFile(tmp_path / "log", max_bytes=10)
    file.write(b"abc")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"abc"


def test_a_full_disk_costs_the_bytes_and_is_said_once(caplog: pytest.LogCaptureFixture):
    file = BoundedFile(Path("/dev/full"), max_bytes=10)
    file.write(b"a")
    file.write(b"b")
    file.close()
    assert caplog.text.count("No space left") == 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\r\n\r\n", "a\nb"),
        (b"\x1b[2J\x07bell", "�[2J�bell"),
        (b"caf\xc3\xa9 \xff", "café �"),
        (b"", ""),
    ],
)
def test_a_guest_cannot_play_with_the_terminal(data: bytes, text: str):
    assert printable(data) == text


def test_last_lines():
    assert last_lines("a\nb\nc", 2) == "b\nc"
    assert last_lines("a", 2) == "a"
