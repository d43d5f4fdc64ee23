"""``vcnode cp`` out of a container: what a stranger's archive may do on this machine."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import threading
from pathlib import Path

import pytest

from vcnode.cli.files import _unpack

Entry = tuple[str, bytes, str | bytes]
"""Name, type, and what it links to or holds."""
SECRET = b"mine"
REG, LNK, SYM, DIR, BLK = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.BLKTYPE


def unpack(entries: list[Entry], target: Path) -> None:
    reading, writing = os.pipe()

    def pack() -> None:
        with (
            contextlib.suppress(BrokenPipeError),
            os.fdopen(writing, "wb") as sink,
            tarfile.open(fileobj=sink, mode="w|") as archive,
        ):
            for name, kind, what in entries:
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = kind, 0o755
                entry.uid, entry.gid = os.getuid(), os.getgid()
                content = what if isinstance(what, bytes) else b""
                entry.linkname = what if isinstance(what, str) else ""
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    packing = threading.Thread(target=pack)
    packing.start()
    try:
        _unpack(reading, str(target))
    finally:
        packing.join()


@pytest.mark.parametrize(
    "entries",
    [
        [("a", LNK, "{secret}"), ("a", REG, b"evil")],
        [("a", LNK, "../secret"), ("a", REG, b"evil")],
        [("a", LNK, "../secret")],
        [("a", LNK, "{secret}")],
        [("s", SYM, "../secret"), ("a", LNK, "s")],
        [("s", SYM, "../secret"), ("s", REG, b"evil")],
        [("s", SYM, ".."), ("s/secret", REG, b"evil")],
        [("s", SYM, ".."), ("a", LNK, "s/secret"), ("a", REG, b"evil")],
        [("s", SYM, ".."), ("s", DIR, b""), ("s/secret", REG, b"evil")],
        [("../secret", REG, b"evil")],
        [("a", REG, b"x"), ("a", LNK, "a")],
        [("dev", BLK, b"")],
    ],
)
def test_nothing_leads_out_of_where_it_is_unpacked(entries: list[Entry], tmp_path: Path) -> None:
    secret, into = tmp_path / "secret", tmp_path / "into"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    into.mkdir()
    before = secret.stat()
    filled = [
        (name, kind, what.format(secret=secret) if isinstance(what, str) else what)
        for name, kind, what in entries
    ]
    with contextlib.suppress(OSError, tarfile.TarError):
        unpack(filled, into)
    after = secret.stat()
    assert secret.read_bytes() == SECRET
    assert (after.st_mode, after.st_nlink, after.st_ctime_ns) == (
        before.st_mode,
        before.st_nlink,
        before.st_ctime_ns,
    )
    assert not any(path.is_block_device() for path in into.iterdir())


def test_links_in_an_archive_stay_links(tmp_path: Path) -> None:
    """Also under another name, and a hard link to a symbolic one."""
    unpack(
        [
            ("site", DIR, b""),
            ("site/a", REG, b"content"),
            ("site/b", LNK, "site/a"),
            ("site/s", SYM, "/elsewhere"),
            ("site/t", LNK, "site/s"),
        ],
        tmp_path / "there",
    )
    there = tmp_path / "there"
    assert (there / "b").samefile(there / "a")
    assert (there / "t").readlink() == (there / "s").readlink() == Path("/elsewhere")


def test_a_link_to_a_directory_can_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    unpack([(".", DIR, b""), ("./f", REG, b"x")], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "f").read_bytes() == b"x"
