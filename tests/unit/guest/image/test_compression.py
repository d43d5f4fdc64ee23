from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable

import pytest

from vcnode.guest.image.compression import decompress
from vcnode.guest.image.errors import GuestImageError

CONTENT = b"kernel " * 10_000
SIZE = len(CONTENT).to_bytes(4, "little")  # what the kernel's build puts behind its payload


def _tool(*command: str) -> bytes:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, input=CONTENT, capture_output=True, check=True).stdout


def _xz_as_the_kernel() -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}]
    return lzma.compress(CONTENT, check=lzma.CHECK_CRC32, filters=filters)


FORMATS: dict[str, Callable[[], bytes]] = {
    "xz": _xz_as_the_kernel,
    "lzma": lambda: lzma.compress(CONTENT, format=lzma.FORMAT_ALONE),
    "gzip": lambda: gzip.compress(CONTENT),
    "bzip2": lambda: bz2.compress(CONTENT),
    "zstd": lambda: _tool("zstd", "-qc"),
    "lz4-legacy": lambda: _tool("lz4", "-lqc"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tail", [b"", SIZE], ids=["bare", "with size behind"])
def test_format_is_read(name: str, tail: bytes) -> None:
    assert decompress(FORMATS[name]() + tail) == CONTENT


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_that_is_cut_short_is_an_error(name: str) -> None:
    compressed = FORMATS[name]()
    with pytest.raises(GuestImageError):
        decompress(compressed[: len(compressed) // 2])


def test_unknown_format_shows_its_first_bytes() -> None:
    with pytest.raises(GuestImageError, match="4d 5a 90"):
        decompress(b"MZ\x90\0\0\0")


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(GuestImageError, match="apt-get install zstd"):
        decompress(b"\x28\xb5\x2f\xfd....")
