import io
import os
import stat
import tarfile

import pytest

from vcnode.drivers.storage import unpack

pytestmark = pytest.mark.root


def entry(name, kind=tarfile.REGTYPE, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(*entries, mode="w", form=tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def root(host):
    path = host.top / "out"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def run(host, root):
    def run(data: bytes, reserve_bytes: int = 0) -> None:
        (host.top / "in.tar").write_bytes(data)
        tar_fd = os.open(host.top / "in.tar", os.O_RDONLY)
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        before = len(os.listdir("/proc/self/fd"))
        try:
            unpack.unpack(tar_fd, root_fd, reserve_bytes=reserve_bytes)
        finally:
            assert len(os.listdir("/proc/self/fd")) == before
            os.close(tar_fd)
            os.close(root_fd)
        assert sorted(os.listdir(host.top)) == ["in.tar", "out", "precious", "roots"]

    return run


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_usual_kind_of_tar_is_read(run, root, mode, form):
    run(archive(entry("etc/hostname", data=b"box\n"), mode=mode, form=form))
    assert (root / "etc/hostname").read_text() == "box\n"


def test_owner_mode_time_and_attributes_are_kept(run, root):
    xattrs = {
        "SCHILY.xattr.user.note": "hi",
        "SCHILY.xattr.security.capability": "\x01\0\0\x02\0\x20" + "\0" * 14,
    }
    run(
        archive(
            entry("bin", tarfile.DIRTYPE, mode=0o1777, uid=7, gid=8, mtime=1000),
            entry("bin/su", data=b"x", mode=0o4755, uid=1234, gid=5678, mtime=2000, pax_headers=xattrs),
        )
    )
    file, directory = (root / "bin/su").stat(), (root / "bin").stat()
    assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid, file.st_mtime) == (0o4755, 1234, 5678, 2000)
    assert (stat.S_IMODE(directory.st_mode), directory.st_uid, directory.st_mtime) == (0o1777, 7, 1000)
    assert os.getxattr(root / "bin/su", "user.note") == b"hi"
    assert os.getxattr(root / "bin/su", "security.capability")[:4] == b"\x01\0\0\x02"


def test_attributes_that_would_steer_an_overlay_are_dropped(run, root):
    xattrs = {"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.trusted.overlay.opaque": "y"}
    run(archive(entry("d", tarfile.DIRTYPE, pax_headers=xattrs)))
    assert os.listxattr(root / "d") == []


def test_links_devices_and_fifos_are_kept(run, root):
    run(
        archive(
            entry("a", data=b"x"),
            entry("b", tarfile.LNKTYPE, linkname="a"),
            entry("c", tarfile.SYMTYPE, linkname="/anywhere/at/all"),
            entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
            entry("fifo", tarfile.FIFOTYPE),
        )
    )
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino
    assert os.readlink(root / "c") == "/anywhere/at/all"
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO((root / "fifo").stat().st_mode)


def test_root_entry_gives_the_root_its_metadata(run, root):
    """umoci writes one named "/"."""
    run(archive(entry("/", tarfile.DIRTYPE, mode=0o711, mtime=5), entry("./a", data=b"x")))
    assert stat.S_IMODE(root.stat().st_mode) == 0o711
    assert root.stat().st_mtime == 5


def test_directories_that_no_entry_names_look_the_same_every_time(run, root):
    run(archive(entry("a/b/c", data=b"x", mtime=9)))
    for path in (root, root / "a", root / "a/b"):
        assert (path.stat().st_mtime, stat.S_IMODE(path.stat().st_mode)) == (0, 0o755)


@pytest.mark.parametrize("target", ["{precious}", "../precious", "../../../../../../../../{precious}"])
def test_writing_through_a_link_stays_inside(run, root, host, target):
    """The classic: a link out, then a file through it. Inside a container that link means its own /…."""
    inside = str(host.precious).lstrip("/")
    run(
        archive(
            entry(inside, tarfile.DIRTYPE),
            entry("precious", tarfile.DIRTYPE),
            entry("out", tarfile.SYMTYPE, linkname=target.format(precious=host.precious)),
            entry("out/keep", data=b"owned"),
        )
    )
    assert (host.precious / "keep").read_text() == "precious"
    assert [p.read_text() for p in (root / "precious/keep", root / inside / "keep") if p.exists()] == [
        "owned"
    ]


def test_link_to_a_missing_directory_is_refused(run):
    with pytest.raises(unpack.RefusedError, match="cannot be made"):
        run(archive(entry("out", tarfile.SYMTYPE, linkname="/nowhere"), entry("out/x", data=b"x")))


def test_file_replaces_a_link_of_its_name_instead_of_following_it(run, root, host):
    keep = str(host.precious / "keep")
    run(archive(entry("x", tarfile.SYMTYPE, linkname=keep), entry("x", data=b"new")))
    assert not (root / "x").is_symlink()
    assert (root / "x").read_text() == "new"


def test_hard_link_cannot_reach_out(run, host, root):
    for name in (str(host.precious / "keep"), "out/keep"):
        with pytest.raises(unpack.RefusedError, match=r"hard link|cannot be made"):
            run(
                archive(
                    entry("out", tarfile.SYMTYPE, linkname=str(host.precious)),
                    entry("hard", tarfile.LNKTYPE, linkname=name),
                )
            )
    assert (host.precious / "keep").stat().st_nlink == 1


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/../x", "a/.."])
def test_names_that_lead_upwards_are_refused(run, name):
    with pytest.raises(unpack.RefusedError, match="leads out"):
        run(archive(entry(name, data=b"x")))


def test_absolute_names_lie_in_the_root(run, root):
    run(archive(entry("/etc/passwd", data=b"x"), entry("//double//slash", data=b"y")))
    assert (root / "etc/passwd").read_text() == "x"
    assert (root / "double/slash").read_text() == "y"


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([entry("a", data=b"x"), entry("a/b", data=b"x")], id="file as directory"),
        pytest.param([entry("d/x", data=b"x"), entry("d", data=b"x")], id="file over filled directory"),
        pytest.param([entry("x" * 300, data=b"x")], id="name too long"),
        pytest.param([entry("/".join(["d"] * 3000), data=b"x")], id="path too long"),
        pytest.param([entry("/", data=b"x")], id="root is a file"),
        pytest.param([entry("l", tarfile.LNKTYPE, linkname="l")], id="link to itself"),
        pytest.param([entry("l", tarfile.LNKTYPE, linkname="../x")], id="link upwards"),
        pytest.param(
            [entry("d", tarfile.DIRTYPE), entry("l", tarfile.LNKTYPE, linkname="d")], id="link to directory"
        ),
        pytest.param([entry("s", tarfile.SYMTYPE, linkname="s"), entry("s/x", data=b"x")], id="circle"),
        pytest.param([entry("x", b"Z")], id="unknown kind"),
        pytest.param([entry("x", data=b"x", pax_headers={"mtime": "nan"})], id="time is no number"),
        pytest.param([entry("x", data=b"x", pax_headers={"mtime": "1e400"})], id="time without end"),
        pytest.param([entry("x", data=b"x", pax_headers={"uid": "99999999999999"})], id="owner out of range"),
        pytest.param([], id="empty"),
    ],
)
def test_nonsense_is_refused(run, entries):
    with pytest.raises(unpack.RefusedError):
        run(archive(*entries))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        os.urandom(4096),
        b"\x1f\x8b" + b"x" * 600,
        b"BZh9" + b"x" * 600,
        b"\xfd7zXZ\0" + b"x" * 600,
    ],
    ids=["nothing", "text", "noise", "gzip", "bzip2", "xz"],
)
def test_what_is_no_tar_is_refused(run, data):
    with pytest.raises(unpack.RefusedError):
        run(data)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_truncated_archives_are_refused_wherever_they_end(run, root, mode):
    data = archive(*(entry(f"f{n}", data=os.urandom(3000)) for n in range(4)), mode=mode)
    for size in range(700, len(data) - 11000, 1501):
        with pytest.raises(unpack.RefusedError):
            run(data[:size])


def test_damage_in_the_middle_is_not_taken_for_the_end(run):
    data = bytearray(archive(entry("a", data=b"x" * 512), entry("b", data=b"y")))
    data[1024 : 1024 + 512] = b"garbage!" * 64
    with pytest.raises(unpack.RefusedError, match="damaged"):
        run(bytes(data))


def test_too_little_space_ends_it_early(run, root):
    with pytest.raises(OSError, match="No space"):
        run(archive(entry("big", data=b"x" * 4_000_000)), reserve_bytes=2**60)
    assert not (root / "big").exists()


def test_later_entry_of_the_same_directory_counts(run, root):
    run(archive(*(entry("d", tarfile.DIRTYPE, mode=mode) for mode in (0o700, 0o711))))
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o711


def test_directory_that_became_a_link_gets_no_mode_through_it(run, root, host):
    before = host.precious.stat().st_mode
    run(
        archive(
            entry("d", tarfile.DIRTYPE, mode=0o777),
            entry("d", tarfile.SYMTYPE, linkname=str(host.precious)),
        )
    )
    assert host.precious.stat().st_mode == before
    assert (root / "d").is_symlink()
