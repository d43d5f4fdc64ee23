"""Layers over each other, and container images as files: what is kept, hidden, confined and refused."""

import contextlib
import gzip
import json
import os
import shutil
import stat
import subprocess
import tarfile

import pytest

from tests.support.images import Layout, entry, layer, layout
from vcnode.drivers.storage import unpack
from vcnode.drivers.storage.images import ImageStore
from vcnode.errors import InvalidArgumentError
from vcnode.settings import ImageSettings

pytestmark = pytest.mark.root
DIR = tarfile.DIRTYPE


@pytest.fixture
def root(host):
    path = host.top / "out"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def run(host, root):
    def run(*layers: bytes, **limits) -> None:
        fds = []
        for number, data in enumerate(layers):
            (host.top / f"{number}.tar").write_bytes(data)
            fds.append(os.open(host.top / f"{number}.tar", os.O_RDONLY))
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            unpack.unpack_layers([(fd, None) for fd in fds], root_fd, reserve_bytes=0, **limits)
        finally:
            for fd in [*fds, root_fd]:
                os.close(fd)

    return run


def names(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_whiteouts_hide_what_is_below_and_nothing_of_their_own_layer(run, root):
    run(
        layer(entry("a/x"), entry("a/y"), entry("b/deep/z"), entry("c"), entry(".wh.ignored")),
        # The new a/x comes before the mark that hides the old ones.
        layer(entry("a/x", b"new"), entry("a/.wh..wh..opq"), entry(".wh.b"), entry("no/.wh.thing")),
        layer(entry(".wh.c"), entry("c/d")),
    )
    assert names(root) == ["a", "a/x", "c", "c/d"]
    assert (root / "a/x").read_text() == "new"


def test_a_later_layer_may_turn_a_filled_directory_into_a_file_and_back(run, root):
    run(layer(entry("p/q/r")), layer(entry("p", b"file")), layer(entry("p", kind=DIR), entry("p/s")))
    assert names(root) == ["p", "p/s"]


def test_owners_modes_links_and_attributes_survive_later_layers(run, root):
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    pax = {"SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape")}
    run(
        layer(
            entry("d", kind=DIR, uid=5, gid=6, mode=0o2775),
            entry("d/su", b"x", uid=0, gid=7, mode=0o4755),
            entry("d/ping", b"y", pax_headers=pax),
            entry("d/hard", kind=tarfile.LNKTYPE, linkname="d/su"),
        ),
        layer(entry("d/more", b"z"), entry("again", kind=tarfile.LNKTYPE, linkname="d/su")),
    )
    su = (root / "d/su").stat()
    assert (su.st_gid, stat.S_IMODE(su.st_mode), su.st_nlink) == (7, 0o4755, 3)
    assert os.getxattr(root / "d/ping", "security.capability") == capability
    top = (root / "d").stat()
    # The second layer speaks of a file in it only: all else stays, its time too.
    assert (top.st_uid, top.st_gid, stat.S_IMODE(top.st_mode)) == (5, 6, 0o2775)
    assert top.st_mtime == 1_500_000_000


@pytest.mark.parametrize("name", ["../.wh.keep", "/../precious/.wh.keep", "up/.wh.keep", ".wh.up"])
def test_whiteouts_remove_nothing_outside(run, root, host, name):
    link = entry("up", kind=tarfile.SYMTYPE, linkname=str(host.precious))
    with contextlib.suppress(unpack.RefusedError):
        run(layer(link, entry("x")), layer(entry(name)))
    assert (host.precious / "keep").read_text() == "precious"


@pytest.mark.parametrize("name", [".wh...", ".wh..", ".wh."])
def test_whiteouts_of_nothing_are_refused(run, name):
    with pytest.raises(unpack.RefusedError):
        run(layer(entry("x")), layer(entry(name)))


def test_entries_never_leave_the_root(run, root, host):
    run(
        layer(entry("up", kind=tarfile.SYMTYPE, linkname=str(host.precious))),
        layer(entry(f"{str(host.precious).lstrip('/')}/in", b"image")),
        layer(entry("up/keep", b"theirs")),
    )
    assert (root / str(host.precious).lstrip("/") / "keep").read_text() == "theirs"


def test_device_nodes_stay_in_a_directory_for_root_alone(run, root):
    run(layer(entry("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)))
    assert stat.S_ISCHR((root / "null").lstat().st_mode)


def test_a_giant_file_of_holes_is_refused(run, root):
    info = tarfile.TarInfo("hole")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    info.pax_headers["GNU.sparse.name"] = "hole"
    info.size = 512
    with pytest.raises(unpack.RefusedError, match="larger"):
        run(layer((info, b"0\n".ljust(512, b"\0"))), max_bytes=8 << 20)


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: zstd(data)], ids=["gzip", "zstd"])
def test_layers_are_decompressed(run, root, pack):
    run(pack(layer(entry("low"))), pack(layer(entry("x", b"y"), entry(".wh.low"))))
    assert names(root) == ["x"]


def zstd(data):
    return subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout


def test_damaged_zstd_is_refused(run):
    with pytest.raises(unpack.RefusedError):
        run(zstd(layer(entry("x", os.urandom(100_000))))[:-500])


# ---- whole images ------------------------------------------------------------------------------------


@pytest.fixture
def store(host):
    made = ImageStore(host.state, host.allowed, ImageSettings(max_size_mib=64), reserve_bytes=0)
    yield made
    assert os.listdir(host.state / "images" / "tmp") == []


LAYERS = (layer(entry("bin/app", b"#!"), entry("gone")), layer(entry(".wh.gone"), entry("etc/x", b"y")))
CONFIG = {"Cmd": ["/bin/app"], "User": "app", "WorkingDir": "srv", "StopSignal": "SIGRTMIN+3"}


def docker_archive(path, layers, config):
    """What ``docker save`` writes."""
    members = [entry(f"{number}/layer.tar", data) for number, data in enumerate(layers)]
    manifest = [
        {"Config": "c.json", "RepoTags": ["a:1"], "Layers": [f"{n}/layer.tar" for n in range(len(layers))]}
    ]
    members.append(entry("c.json", json.dumps({"config": config}).encode()))
    members.append(entry("manifest.json", json.dumps(manifest).encode()))
    path.write_bytes(layer(*members))
    return path


async def test_one_image_in_four_forms_is_one_file(store, host):
    directory = layout(host.roots / "layout", *LAYERS, config=CONFIG)
    zipped = layout(host.roots / "zstd", *map(zstd, LAYERS), config=CONFIG, suffix="+zstd")
    archive = shutil.make_archive(str(host.roots / "archive"), "tar", directory)
    saved = docker_archive(host.roots / "saved.tar", LAYERS, CONFIG)
    made = [await store.build(str(path), timeout_s=60) for path in (directory, zipped, archive, saved)]
    assert len({image.digest for image in made}) == 1
    config = made[0].config
    assert (config.cmd, config.user, config.workdir, config.stop_signal) == (
        ("/bin/app",),
        "app",
        "/srv",
        37,
    )
    assert {image.config for image in made} == {config}
    assert made[0].manifest_digest == made[2].manifest_digest
    assert made[3].manifest_digest is None


async def test_a_root_filesystem_with_a_manifest_json_is_no_image(store, host):
    (host.roots / "app" / "manifest.json").write_text("[]x")
    image = await store.build(str(host.roots / "app"), timeout_s=60)
    assert image.config is None


def break_layer(made: Layout, manifest):
    for blob in (made.path / "blobs" / "sha256").iterdir():
        if blob.read_bytes()[:2] == b"\x1f\x8b":
            blob.write_bytes(gzip.compress(layer(entry("evil"))))


def break_manifest(made: Layout, manifest):
    path = made.path / "blobs" / "sha256" / manifest["digest"].removeprefix("sha256:")
    path.write_bytes(path.read_bytes() + b" ")


def link_blobs_out(made: Layout, manifest):
    shutil.rmtree(made.path / "blobs")
    (made.path / "blobs").symlink_to("/etc")


def climb(made: Layout, manifest):
    made.index({**manifest, "digest": "sha256:../../../../etc/passwd"})


def other_machine(made: Layout, manifest):
    made.index({**manifest, "platform": {"os": "linux", "architecture": "mips"}})


def loop(made: Layout, manifest):
    made.index(manifest, manifest)


def fifo(made: Layout, manifest):
    (made.path / "index.json").unlink()
    os.mkfifo(made.path / "index.json")


@pytest.mark.parametrize(
    "harm", [break_layer, break_manifest, link_blobs_out, climb, other_machine, loop, fifo]
)
async def test_images_that_are_not_what_they_say_are_refused(store, host, harm):
    made = Layout(host.roots / "bad")
    manifest = made.image(LAYERS, CONFIG)
    made.index(manifest)
    harm(made, manifest)
    with pytest.raises(InvalidArgumentError):
        await store.build(str(made.path), timeout_s=60)
    assert os.listdir(host.state / "images") == ["tmp"]


@pytest.mark.parametrize(
    "config",
    [
        {"Env": ["=x"]},
        {"Cmd": "text"},
        {"Cmd": ["a\0b"]},
        {"StopSignal": "SIGNONE"},
        {"StopSignal": "65"},
        {"Env": ["A=1"] * 5000},
    ],
)
async def test_configs_that_make_no_sense_are_refused(store, host, config):
    with pytest.raises(InvalidArgumentError):
        await store.build(str(layout(host.roots / "odd", *LAYERS, config=config)), timeout_s=60)
