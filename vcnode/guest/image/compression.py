"""Decompression by magic number: the kernel's payload and packaged kernel modules.

What the standard library cannot read is piped through the tool of the field (``zstd``, ``lz4``).
"""

from __future__ import annotations

import bz2
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable

from vcnode.guest.image.errors import GuestImageError

_TOOL_TIMEOUT_S = 300.0


def decompress(data: bytes) -> bytes:
    """Decompress *data*; what comes after the first stream is ignored. Uncompressed data is an error.

    Raises:
        GuestImageError: The format is unknown, the data is damaged, or the tool for it is not installed.
    """
    for magic, reader in _READERS:
        if data.startswith(magic):
            try:
                return reader(data)
            except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as exc:
                raise GuestImageError(f"Compressed data is damaged ({reader.__name__.lstrip('_')}).") from exc
    raise GuestImageError(f"The data begins with {data[:6].hex(' ')}: no compression that is known here.")


def _xz(data: bytes) -> bytes:
    return _all(lzma.LZMADecompressor(lzma.FORMAT_XZ), data)


def _lzma(data: bytes) -> bytes:
    return _all(lzma.LZMADecompressor(lzma.FORMAT_ALONE), data)


def _bzip2(data: bytes) -> bytes:
    return _all(bz2.BZ2Decompressor(), data)


def _all(reader: lzma.LZMADecompressor | bz2.BZ2Decompressor, data: bytes) -> bytes:
    content = reader.decompress(data)
    if not reader.eof:
        raise EOFError("the stream is cut short")
    return content


def _gzip(data: bytes) -> bytes:
    reader = zlib.decompressobj(wbits=31)
    content = reader.decompress(data)
    if not reader.eof:
        raise EOFError("the stream is cut short")
    return content


def _zstd(data: bytes) -> bytes:
    # The kernel's payload has the plain size behind it: the tool complains about those 4 bytes after it
    # has written all of the frame.
    return _piped("zstd", "-dcq", data=data)


def _lz4(data: bytes) -> bytes:
    return _piped("lz4", "-dcq", data=data)


def _piped(tool: str, *arguments: str, data: bytes) -> bytes:
    if shutil.which(tool) is None:
        raise GuestImageError(
            f"The program '{tool}' is needed to unpack this kernel: apt-get install {tool}."
        )
    try:
        done = subprocess.run(
            [tool, *arguments], input=data, capture_output=True, timeout=_TOOL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise GuestImageError(f"'{tool}' took more than {_TOOL_TIMEOUT_S:.0f} s.") from exc
    if not done.stdout:
        raise EOFError(done.stderr.decode(errors="replace").strip())
    return done.stdout


_READERS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\xfd7zXZ\0", _xz),
    (b"\x1f\x8b", _gzip),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x02\x21\x4c\x18", _lz4),  # the legacy format, which the kernel uses
    (b"BZh", _bzip2),
    (b"\x5d\0\0", _lzma),
)
