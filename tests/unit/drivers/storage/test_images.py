import asyncio
import gzip
import hashlib
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading

import pytest

from vcnode.drivers.storage import images, tools
from vcnode.drivers.storage.images import ImageStore
from vcnode.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StorageError,
)

pytestmark = pytest.mark.root


@pytest.fixture
def store(host):
    made = ImageStore(host.state, host.allowed, reserve_bytes=0)
    yield made
    assert os.listdir(host.state / "images" / "tmp") == []


def files(host):
    return sorted(name for name in os.listdir(host.state / "images") if name != "tmp")


@pytest.fixture
def mounted(host):
    """Mounts an image and shows it as {path: (mode, owner, time, content)}."""

    def show(image):
        target = host.top / "mnt"
        target.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", image.path, target], check=True)
        try:
            seen = {}
            for path in [target, *sorted(target.rglob("*"))]:
                info = path.lstat()
                content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
                content = os.readlink(path).encode() if path.is_symlink() else content
                name = str(path.relative_to(target))
                seen[name] = (stat.filemode(info.st_mode), info.st_uid, info.st_mtime_ns, content)
            return seen
        finally:
            subprocess.run(["umount", target], check=True)

    return show


async def test_directory_becomes_an_image_named_after_its_bytes(store, host, mounted):
    app = host.roots / "app"
    os.chown(app / "bin" / "sh", 42, 43)
    os.chmod(app / "bin" / "sh", 0o4755)
    os.utime(app / "bin" / "sh", ns=(0, 1_500_000_000_123_456_789))
    (app / "link").symlink_to("/precious")
    image = await store.build(str(app), timeout_s=30)
    data = image.path.read_bytes()
    assert image.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert image.size_bytes == len(data)
    assert stat.S_IMODE(image.path.stat().st_mode) == 0o444
    assert store.file(image.digest) == image
    seen = mounted(image)
    assert seen["bin/sh"] == ("-rwsr-xr-x", 42, 1_500_000_000_123_456_789, b"#!")
    assert seen["link"][3] == b"/precious"


async def test_same_content_gives_the_same_digest_whatever_its_order_and_place(store, host):
    names = [f"f{number}" for number in range(60)]
    digests = set()
    for number, order in enumerate((names, names[::-1])):
        top = host.roots / f"copy{number}"
        (top / "d").mkdir(parents=True)
        for name in order:
            (top / "d" / name).write_text(name * 50)
            os.setxattr(top / "d" / name, "user.same", b"value")
            os.utime(top / "d" / name, (5, 5))
        os.link(top / "d" / "f1", top / "d" / "hard")
        for directory in (top / "d", top):
            os.utime(directory, (7, 7))
        digests.add((await store.build(str(top), timeout_s=30)).digest)
    assert len(digests) == 1
    assert len(files(host)) == 1


async def test_tar_of_a_directory_gives_the_same_image(store, host):
    app = host.roots / "app"
    for path in (app / "bin" / "sh", app / "bin", app):
        os.utime(path, (1000, 1000))
    with tarfile.open(host.roots / "app.tar.gz", "w:gz") as tar:
        tar.add(app, arcname=".")
    from_tar = await store.build(str(host.roots / "app.tar.gz"), timeout_s=30)
    assert from_tar.digest == (await store.build(str(app), timeout_s=30)).digest


async def test_device_nodes_and_sockets_of_a_directory_are_no_problem(store, host, mounted):
    os.mknod(host.roots / "app" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(host.roots / "app" / "fifo")
    seen = mounted(await store.build(str(host.roots / "app"), timeout_s=30))
    assert (seen["null"][0], seen["fifo"][0]) == ("crw-r--r--", "prw-r--r--")


async def test_what_is_neither_directory_nor_tar_is_refused(store, host):
    os.mkfifo(host.roots / "fifo")
    for name in ("fifo", "plain"):
        with pytest.raises(InvalidArgumentError):
            await store.build(str(host.roots / name), timeout_s=30)
    with pytest.raises(NotFoundError):
        await store.build(str(host.roots / "nothing"), timeout_s=30)
    with pytest.raises(InvalidArgumentError):
        await store.build(str(host.precious), timeout_s=30)
    assert files(host) == []


async def test_hostile_tar_is_refused_by_name(store, host):
    with tarfile.open(host.roots / "evil.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../../x"))
    with pytest.raises(InvalidArgumentError, match="leads out") as caught:
        await store.build(str(host.roots / "evil.tar"), timeout_s=30)
    assert "evil.tar" in caught.value.message
    assert files(host) == []


async def test_header_that_wants_much_memory_is_refused(store, host, monkeypatch):
    """A few kilobytes of gzip that unfold into one extended header of hundreds of megabytes."""
    monkeypatch.setattr(images, "_UNPACK_MEMORY_BYTES", 200 * 1024**2)
    big = tarfile.TarInfo("x")
    big.type, big.size = tarfile.XHDTYPE, 300 * 1024**2
    with gzip.open(host.roots / "bomb.tar.gz", "wb", compresslevel=1) as bomb:
        bomb.write(big.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(300):
            bomb.write(bytes(1024**2))
    with pytest.raises(InvalidArgumentError, match="memory"):
        await store.build(str(host.roots / "bomb.tar.gz"), timeout_s=50)


@pytest.mark.parametrize("kind", ["directory", "tar"])
async def test_too_little_space_is_said_and_nothing_is_left(host, kind):
    store = ImageStore(host.state, host.allowed, reserve_bytes=2**60)
    source = host.roots / "app"
    (source / "big").write_bytes(bytes(3_000_000))
    if kind == "tar":
        source = host.roots / "app.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(host.roots / "app", arcname=".")
    with pytest.raises(ResourceExhaustedError, match="space"):
        await store.build(str(source), timeout_s=30)
    assert files(host) == []
    assert os.listdir(host.state / "images" / "tmp") == []


@pytest.fixture
def slow_mkfs(host, monkeypatch):
    """A mkfs that says when it runs and then never ends, nor what it started."""
    running = host.top / "running"
    os.mkfifo(running)
    script = f"echo $$ > {running}; sleep 1000 & wait"
    monkeypatch.setattr(images, "mkfs_argv", lambda *_: ["/bin/sh", "-c", script])
    return running


async def test_late_build_is_killed_and_leaves_nothing(store, host, slow_mkfs):
    reader = os.open(slow_mkfs, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(DeadlineExceededError, match="nothing was made"):
        await store.build(str(host.roots / "app"), timeout_s=0.5)
    pid = int(os.read(reader, 100))
    os.close(reader)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert host.mounts() == []
    assert files(host) == []


async def test_cancelled_build_leaves_nothing(store, host, slow_mkfs):
    build = asyncio.ensure_future(store.build(str(host.roots / "app"), timeout_s=30))
    await asyncio.to_thread(slow_mkfs.read_text)
    assert host.mounts() != []
    build.cancel()
    with pytest.raises(asyncio.CancelledError):
        await build
    assert host.mounts() == []
    assert os.listdir(host.state / "images" / "tmp") == []


async def test_cancelled_while_the_digest_is_read_leaves_no_image(store, host, monkeypatch):
    reading, go_on = asyncio.Event(), threading.Event()
    loop, real = asyncio.get_running_loop(), store._digest_and_rename

    def slow(target, stop):
        loop.call_soon_threadsafe(reading.set)
        go_on.wait(10)
        return real(target, threading.Event())  # it had looked at `stop` just before

    monkeypatch.setattr(store, "_digest_and_rename", slow)
    build = asyncio.ensure_future(store.build(str(host.roots / "app"), timeout_s=30))
    await reading.wait()
    build.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await build
    assert files(host) == []


async def test_builds_wait_for_each_other(store, host):
    results = await asyncio.gather(*(store.build(str(host.roots / "app"), timeout_s=30) for _ in range(4)))
    assert len(set(results)) == 1


async def test_failing_and_missing_mkfs_are_explained(store, host, monkeypatch):
    monkeypatch.setattr(images, "mkfs_argv", lambda *_: ["/bin/false"])
    with pytest.raises(StorageError, match="log says why"):
        await store.build(str(host.roots / "app"), timeout_s=30)
    monkeypatch.setattr(images, "mkfs_argv", lambda *_: ["/nonexistent/mkfs.erofs"])
    with pytest.raises(StorageError, match="erofs-utils"):
        await store.build(str(host.roots / "app"), timeout_s=30)
    assert files(host) == []


def test_sweep_removes_what_a_killed_node_left_and_nothing_else(store, host):
    image = asyncio.run(store.build(str(host.roots / "app"), timeout_s=30))
    job = host.state / "images" / "tmp" / "job"
    (job / "root").mkdir(parents=True)
    (job / "image.erofs").write_text("half")
    (job.parent / "stray").write_text("x")
    (job.parent / "link").symlink_to(host.precious)
    subprocess.run(["mount", "--bind", host.precious, job / "root"], check=True)
    store.sweep()
    assert os.listdir(job.parent) == []
    assert store.file(image.digest) == image


async def test_removed_image_is_gone_and_removing_again_succeeds(store, host):
    image = await store.build(str(host.roots / "app"), timeout_s=30)
    store.remove(image.digest)
    store.remove(image.digest)
    with pytest.raises(NotFoundError):
        store.file(image.digest)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 64]
)
def test_odd_digests_are_refused(host, digest):
    store = ImageStore(host.state, host.allowed)
    for call in (store.file, store.remove):
        with pytest.raises(InvalidArgumentError):
            call(digest)


async def test_tool_output_is_bounded_and_its_environment_is_plain(host, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    code = "import os; print('y' * 1_000_000 + str(sorted(os.environ)))"
    ended = await tools.run([sys.executable, "-I", "-S", "-c", code], file_bytes=0)
    assert ended.output.endswith("['LC_ALL', 'PATH']")
    assert len(ended.output) <= 4096


async def test_tool_that_writes_too_much_is_ended(host):
    ended = await tools.run(
        ["/bin/sh", "-c", f"exec head -c 100000 /dev/zero > {host.top}/f"], file_bytes=5000
    )
    assert ended.returncode == -signal.SIGXFSZ
