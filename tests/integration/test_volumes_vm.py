"""Volumes, mounts and sockets of a pod in a real VM: one for all of it, as a boot costs seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest_here import make_busybox
from tests.integration.test_life import LIMIT_S, Rig
from vcnode.drivers.hypervisor.qemu import virtiofsd
from vcnode.errors import FailedPreconditionError
from vcnode.models.network import NetworkModel
from vcnode.models.pod import PodSpec
from vcnode.models.volumes import Mount, Volume
from vcnode.settings import NatsSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

LONG_TAG = "a-tag-that-is-much-longer-than-31-bytes-which-9p-devices-cannot-have"
FILES = 2000


def settings_of(directory: Path, guest_image: Path) -> Settings:
    return Settings(
        node_name="vols",
        state_dir=directory / "s",
        run_dir=directory / "r",
        guest_dir=guest_image,
        allowed_roots=(directory / "roots",),
        metrics_address="",
        network=NetworkModel.NOOP,
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=LIMIT_S),
    )


def mount(source: str, destination: str, *options: str, **fields: Any) -> Mount:
    return Mount(source=source, destination=destination, options=options, **fields)


async def talk(sock: socket.socket, line: bytes) -> bytes:
    """Send a line, and give what comes back up to the end of one."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, line)
    answer = b""
    async with asyncio.timeout(LIMIT_S):
        while not answer.endswith(b"\n"):
            answer += await loop.sock_recv(sock, 4096)
    return answer


async def test_volumes_and_sockets(
    guest_image: Path, short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    roots = short_dir / "roots"
    for name in ("box", "data", "sealed", "fast"):
        (roots / name).mkdir(parents=True)
    make_busybox(roots / "box")
    (roots / "sealed" / "sub").mkdir()
    (roots / "sealed" / "sub" / "file").write_text("sealed\n")
    (roots / "data" / "out").symlink_to("/etc")
    disk = roots / "disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    await asyncio.to_thread(subprocess.run, ["mkfs.ext4", "-q", "-F", disk], check=True)
    here = socket.socket(socket.AF_UNIX)
    here.bind(str(roots / "here.sock"))
    here.listen()
    here.setblocking(False)
    rig = Rig(settings_of(short_dir, guest_image), roots / "box")
    volumes = [
        {"mount_tag": LONG_TAG, "host_path": str(roots / "data")},
        {"mount_tag": "sealed", "host_path": str(roots / "sealed"), "read_only": True},
        {"mount_tag": "disk", "device": str(disk), "fs": "ext4"},
        {"mount_tag": "fast", "host_path": str(roots / "fast"), "driver": "virtio-fs"},
    ]
    assert virtiofsd.find() is not None, "run dev/setup --tests, which installs it"
    main = rig.container(
        "main",
        *("sleep", "infinity"),
        mounts=(
            mount(LONG_TAG, "/data", "nosuid"),
            mount("sealed/sub/file", "/etc/sealed"),
            mount("disk", "/disk"),
            mount("fast", "/fast"),
            Mount(type="tmpfs", destination="/scratch", options=("size=1m", "mode=0700")),
            mount("ask", "/dev/ask", type="socket"),
            mount("tell", "/dev/tell", type="socket"),
        ),
    )
    spec = PodSpec.model_validate(
        {
            "id": "p1",
            "template": "never",
            "volumes": volumes,
            "sockets": [
                {"name": "ask", "host_path": str(roots / "ask.sock")},
                {"name": "tell", "host_path": str(roots / "here.sock"), "mode": "connect"},
            ],
            "containers": [main.model_dump()],
        },
        strict=False,
    )
    try:
        async with rig.agent():
            await rig.node.pods.run(spec, rig.call("pod.run"))
            await directories(rig, roots)
            await many_files_and_large_ones(rig, roots)
            await concurrent_writers(rig, roots)
            await disks(rig)
            await options(rig)
            await sockets(rig, roots, here)
            await add_while_running(rig, roots)
            await virtio_fs(rig, roots)
        async with rig.agent():  # another node agent finds all of it as it is
            assert await rig.shell("cat /data/hello") == "hello"
            for name in ("main", "other"):
                await rig.node.pods.delete_container("p1", name, True, rig.call())
            await rig.node.pods.detach_volume("p1", LONG_TAG, rig.call("pod.detach_volume"))
            [(helper, _)] = rig.node.pods._parts.live["p1"].vm.record.helpers
            os.kill(helper, signal.SIGKILL)
            async with asyncio.timeout(30):
                while f"lost its virtiofsd {helper}" not in caplog.text:  # noqa: ASYNC110 -- it is a log
                    await asyncio.sleep(0.05)
            await rig.node.pods.stop("p1", 0, rig.call("pod.stop"))
    finally:
        here.close()
        async with rig.agent():
            await rig.node.pods.delete("p1", True, rig.call("pod.delete"))
    assert list((rig.settings.run_dir / "vms").iterdir()) == []
    assert not (roots / "ask.sock").exists()
    assert (roots / "here.sock").exists()
    assert not virtiofsd.named(rig.settings.run_dir / "vms", "")
    await asyncio.to_thread(subprocess.run, ["fsck.ext4", "-n", "-f", disk], check=True)


async def directories(rig: Rig, roots: Path) -> None:
    """Owners, modes and links go both ways; nothing leads out, and what is read-only stays so."""
    data = roots / "data"
    await rig.shell(
        "cd /data; echo hello > hello; chown 7:8 hello; chmod 640 hello; ln -s hello soft; ln hello hard"
    )
    found = (data / "hello").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_nlink) == (7, 8, 0o640, 2)
    assert os.readlink(data / "soft") == "hello"
    (data / "from-host").write_text("seen\n")
    assert await rig.shell("cat /data/from-host /data/soft") == "seen\nhello"
    # A link in there means what it means in the container; one that the host has put there is no way out.
    assert await rig.shell("cat /data/out/sealed") == "sealed"
    assert await rig.shell("! (echo x > /etc/sealed) 2>/dev/null; cat /etc/sealed") == "sealed"
    # In the guest itself a hostile kernel could ignore any flag: the host holds it to that.
    assert "Read-only" in await rig.shell("touch /run/vcnode/shared/volume.sealed/x 2>&1 || true", None)


async def many_files_and_large_ones(rig: Rig, roots: Path) -> None:
    """Thousands of files in one directory, and one larger than memory."""
    await rig.shell(
        f"mkdir /data/many; cd /data/many; i=0; while [ $i -lt {FILES} ]; do : > $i; i=$((i+1)); done"
    )
    assert len(list((roots / "data" / "many").iterdir())) == FILES
    assert await rig.shell("ls /data/many | wc -l") == str(FILES)
    with open(roots / "data" / "large", "wb") as file:
        file.truncate(5 << 30)
        file.seek((5 << 30) - 6)
        file.write(b"ending")
    assert await rig.shell("stat -c %s /data/large; tail -c 6 /data/large") == f"{5 << 30}\nending"
    await rig.shell("printf start | dd of=/data/large bs=1 seek=4300000000 conv=notrunc 2>/dev/null")
    with open(roots / "data" / "large", "rb") as file:
        file.seek(4_300_000_000)
        assert file.read(5) == b"start"


async def concurrent_writers(rig: Rig, roots: Path) -> None:
    """Two containers and the host append to one file, and no line is lost or torn."""
    await rig.start("other", "sleep", "infinity", mounts=(mount(LONG_TAG, "/data"),))
    write = "i=0; while [ $i -lt 200 ]; do echo {0}-$i-{0} >> /data/log; i=$((i+1)); done"

    def on_host() -> None:
        for number in range(200):
            with open(roots / "data" / "log", "a") as file:
                file.write(f"host-{number}-host\n")

    await asyncio.gather(
        rig.shell(write.format("main")), rig.shell(write.format("other"), "other"), asyncio.to_thread(on_host)
    )
    lines = (roots / "data" / "log").read_text().splitlines()
    expected = {f"{who}-{n}-{who}" for who in ("main", "other", "host") for n in range(200)}
    assert len(lines) == 600
    assert set(lines) == expected


async def disks(rig: Rig) -> None:
    """A disk is mounted where it is wanted, in two containers at once, and in no second pod."""
    await rig.shell("echo kept > /disk/file; sync")
    await rig.start("reader", "sleep", "infinity", mounts=(mount("disk", "/d", "ro"),))
    assert await rig.shell("cat /d/file; ! touch /d/x 2>/dev/null", "reader") == "kept"
    await rig.node.pods.delete_container("p1", "reader", True, rig.call())
    assert await rig.shell("cat /disk/file") == "kept"


async def options(rig: Rig) -> None:
    """Mounts have the flags that they were given."""
    mounts = await rig.shell("cat /proc/mounts")
    flags = {line.split()[1]: line.split()[3].split(",") for line in mounts.splitlines()}
    assert {"nosuid", "nodev"} <= set(flags["/data"])
    assert {"size=1024k", "mode=700"} <= set(flags["/scratch"])


async def sockets(rig: Rig, roots: Path, here: socket.socket) -> None:
    """A program on the host talks to one in a container, whoever of the two has made the socket."""
    loop = asyncio.get_running_loop()
    assert stat.S_IMODE((roots / "ask.sock").stat().st_mode) == 0o600
    # A port that nobody has connected to reads as at its end.
    echo = (
        "(while sleep 0.1; do while read l <&3; do echo got $l >&3; done; done) 3<>/dev/{0} >/dev/null 2>&1 &"
    )
    await rig.shell(echo.format("ask") + echo.format("tell") + "true")
    asking = socket.socket(socket.AF_UNIX)
    asking.setblocking(False)
    telling, _ = await loop.sock_accept(here)
    with asking, telling:
        await loop.sock_connect(asking, str(roots / "ask.sock"))
        assert await talk(asking, b"one\n") == b"got one\n"
        assert await talk(telling, b"two\n") == b"got two\n"


async def add_while_running(rig: Rig, roots: Path) -> None:
    """A volume that a running pod gets can be mounted at once, and goes again."""
    (roots / "more").mkdir()
    more = Volume(mount_tag="more", host_path=str(roots / "more"))
    await rig.node.pods.attach_volume("p1", more, rig.call("pod.attach_volume"))
    await rig.start("late", "sleep", "infinity", mounts=(mount("more", "/more"),))
    await rig.shell("echo late > /more/file", "late")
    assert (roots / "more" / "file").read_text() == "late\n"
    with pytest.raises(FailedPreconditionError, match="mounted by late"):
        await rig.node.pods.detach_volume("p1", "more", rig.call("pod.detach_volume"))
    await rig.node.pods.delete_container("p1", "late", True, rig.call())
    await rig.node.pods.detach_volume("p1", "more", rig.call("pod.detach_volume"))
    assert "volume.more" not in os.listdir(next((rig.settings.run_dir / "vms").iterdir()) / "shared")


async def virtio_fs(rig: Rig, roots: Path) -> None:
    """The same by virtio-fs."""
    await rig.shell("cd /fast; echo fast > file; chown 7:8 file; ln -s file soft; mkdir d; touch d/a d/b")
    assert (roots / "fast" / "file").read_text() == "fast\n"
    assert (roots / "fast" / "file").stat().st_uid == 7
    assert sorted(os.listdir(roots / "fast" / "d")) == ["a", "b"]
    (roots / "fast" / "new").write_text("new\n")
    assert await rig.shell("cat /fast/new") == "new"
    assert "virtiofs" in await rig.shell("grep ' /fast ' /proc/mounts")
