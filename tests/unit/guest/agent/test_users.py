"""Users and groups of a hostile root."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.guest.agent import users
from vcnode.guest.agent.failures import Failure

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
broken line
:x:5:5::/x:
ann:x:1000:1000:Ann:/home/ann:/bin/sh
neg:x:-1:-1::/neg:
huge:x:4294967295:0::/huge:
1234:x:77:78::/digits:
nohome:x:1002:1002::relative:
"""
GROUPS = b"""root:x:0:
ann:x:1000:
disk:x:6:ann,bob
wheel:x:10:root,ann
twisted:x:nan:ann
long
"""


def resolve(user: str, group: str | None = None, more: tuple[str, ...] = ()) -> tuple[object, ...]:
    found = users.resolve(user, group, more, passwd=PASSWD, groups=GROUPS)
    return found.uid, found.gid, found.groups, found.home


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("root",), (0, 0, (10,), b"/root")),
        (("0",), (0, 0, (10,), b"/root")),
        (("ann",), (1000, 1000, (6, 10), b"/home/ann")),
        (("ann", "disk"), (1000, 6, (6, 10), b"/home/ann")),
        (("ann:disk",), (1000, 6, (6, 10), b"/home/ann")),
        (("ann:disk", "0"), (1000, 0, (6, 10), b"/home/ann")),
        (("500",), (500, 0, (), b"/")),
        (("500:600",), (500, 600, (), b"/")),
        (("0", None, ("disk", "99")), (0, 0, (6, 10, 99), b"/root")),
        # A user whose name is a number is found by name before a number is taken as one.
        (("1234",), (77, 78, (), b"/digits")),
        (("nohome",), (1002, 1002, (), b"/")),
        (("4294967294",), (4294967294, 0, (), b"/")),
    ],
)
def test_it_is_who_the_files_say(arguments: tuple[str, ...], expected: tuple[object, ...]) -> None:
    assert resolve(*arguments) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [("eve",), ("",), ("neg",), ("huge",), ("4294967295",), ("-1",), ("ann", "none"), ("ann", None, ("x",))],
)
def test_what_is_not_there_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(Failure) as caught:
        resolve(*arguments)  # type: ignore[arg-type]
    assert caught.value.code == "invalid_argument"


@given(passwd=st.binary(max_size=400), groups=st.binary(max_size=400), user=st.text(max_size=8))
def test_no_content_can_break_it(passwd: bytes, groups: bytes, user: str) -> None:
    try:
        found = users.resolve(user, None, (), passwd=passwd, groups=groups)
    except (Failure, UnicodeEncodeError):
        return
    assert 0 <= found.uid <= users.MAX_ID
    assert 0 <= found.gid <= users.MAX_ID
    assert len(found.groups) <= users.MAX_GROUPS


def read(root: Path, name: str = "etc/passwd") -> bytes:
    fd = os.open(root, os.O_PATH)
    try:
        return users.read_database(fd, name)
    finally:
        os.close(fd)


def test_a_link_leads_nowhere_but_into_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"outside")
    (root / "secret").write_bytes(b"inside")
    for target in ("/secret", "../secret", "../../../../secret"):
        (root / "etc/passwd").unlink(missing_ok=True)
        (root / "etc/passwd").symlink_to(target)
        assert read(root) == b"inside"
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to(tmp_path / "secret")
    assert read(root) == b""


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device", "loop"])
def test_what_is_no_file_counts_as_absent(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "passwd"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("dev/null")
    elif kind == "loop":
        path.symlink_to("passwd")
    assert read(tmp_path, "passwd") == b""


def test_a_huge_file_is_read_in_part(tmp_path: Path) -> None:
    with open(tmp_path / "passwd", "wb") as file:
        file.truncate(1 << 33)
    assert len(read(tmp_path, "passwd")) == users.MAX_FILE_BYTES


def root_with(tmp_path: Path, **files: str) -> Path:
    """A root whose files of users have not changed for a while."""
    (tmp_path / "etc").mkdir()
    for name, content in files.items():
        path = tmp_path / "etc" / name
        path.write_text(content)
    return tmp_path


LATER = time.time_ns() + 10**12


def test_stamps_change_with_what_the_files_say(tmp_path: Path) -> None:
    root = root_with(tmp_path, passwd="root:x:0:0::/root:/bin/sh\n")
    first = users.stamps(str(root), lambda: LATER)
    assert first is not None
    assert first[1] is None
    assert users.stamps(str(root), lambda: LATER) == first
    stat = (root / "etc/passwd").stat()
    (root / "etc/passwd").write_text("r00t:x:0:0::/root:/bin/sh\n")
    os.utime(root / "etc/passwd", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a restored file has it
    assert users.stamps(str(root), lambda: LATER) != first
    (root / "etc/group").write_text("root:x:0:\n")
    assert None not in (users.stamps(str(root), lambda: LATER) or (None,))


def test_what_has_just_changed_or_is_a_link_has_no_stamp(tmp_path: Path) -> None:
    root = root_with(tmp_path, passwd="")
    assert users.stamps(str(root)) is None
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/usr/passwd")
    assert users.stamps(str(root), lambda: LATER) is None
    (root / "etc/passwd").unlink()
    (root / "etc").rmdir()
    assert users.stamps(str(root)) == (None, None)
    (root / "etc").symlink_to("/etc")
    assert users.stamps(str(root), lambda: LATER) is None
