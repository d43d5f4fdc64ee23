"""The guest image from the host's real packages: the same bytes twice, rebuilt when it must, and it boots."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu.tsc import measure_khz
from vcnode.guest import image
from vcnode.guest.image import Progress

pytestmark = pytest.mark.timeout(300)

BOOT_TIMEOUT_S = 120.0

AGENT = """\
from __future__ import annotations

import ctypes
import json
import os
import select
import sys
TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio


def main():
    '''Load the modules, tell the host about this guest over the port, and wait for the end.'''
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, target in ((b"proc", b"/proc"), (b"sysfs", b"/sys"), (b"devtmpfs", b"/dev")):
        if libc.mount(kind, target, kind, 0, None):
            raise OSError(ctypes.get_errno(), "mount")
    for name in open("/etc/vcnode/modules").read().split():
        fd = os.open("/lib/modules/" + name, os.O_RDONLY)
        if libc.syscall(313, fd, b"", 0):
            raise OSError(ctypes.get_errno(), name)
        os.close(fd)
    loaded = [line.split()[0] for line in open("/proc/modules")]
    facts = {
        "asserts": __debug__, "docstring": main.__doc__, "file": main.__code__.co_filename,
        "filesystems": open("/proc/filesystems").read().split(),
        "flags": [sys.flags.isolated, sys.flags.no_site, sys.flags.dont_write_bytecode],
        "image": json.load(open("/etc/vcnode/image.json")), "loaded": loaded,
        "listed": [name.removesuffix(".ko") for name in open("/etc/vcnode/modules").read().split()],
        "missing": [path for path in sys.path if not os.path.isdir(path)],
        "modules": sorted(sys.modules), "pid": os.getpid(),
        "shell": shell("echo from busybox"),
    }
    for port in os.listdir("/sys/class/virtio-ports"):
        if open("/sys/class/virtio-ports/" + port + "/name").read().strip() == "vcnode.agent.0":
            with open("/dev/" + port, "wb", buffering=0) as file:
                text = json.dumps(facts).encode() + b"\\n"
                while text:
                    text = text[file.write(text):]
                select.poll().poll()


def shell(command):
    readable, writable = os.pipe()
    if os.fork() == 0:
        os.dup2(writable, 1)
        os.execv("/bin/sh", ["sh", "-c", command])
    os.close(writable)
    return os.read(readable, 100).decode()
"""


def agent(source: str = AGENT) -> Mapping[str, bytes]:
    """A small agent instead of the real one, which has tests of its own."""
    return {
        "vcnode/__init__.py": b'__version__ = "9.9.9"\n',
        "vcnode/guest/__init__.py": b"",
        "vcnode/guest/agent/__init__.py": b"",
        "vcnode/guest/agent/init.py": source.encode(),
    }


def build(
    out_dir: Path, sources: Mapping[str, bytes], *, cache_dir: Path | None = None, offline: bool = False
) -> tuple[image.GuestImage, list[str]]:
    """Build; returns the image and the steps that were told."""
    told: list[Progress] = []
    built = image.build(
        out_dir,
        cache_dir=cache_dir or image.default_cache_dir(),
        offline=offline,
        progress=told.append,
        agent_sources=sources,
    )
    for now in told:
        assert now.step in image.STEPS
        assert 0 <= now.done <= now.total
    return built, list(dict.fromkeys(now.step for now in told))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> image.GuestImage:
    """One image with the small agent; tests may not change it."""
    return build(tmp_path_factory.mktemp("image") / "guest", agent())[0]


def left_beside(out_dir: Path) -> set[str]:
    """What a build left beside its directory."""
    return {path.name for path in out_dir.parent.iterdir()} - {out_dir.name}


def test_a_build_elsewhere_from_nothing_but_packages_gives_the_same_bytes(
    built: image.GuestImage, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    for package in image.default_cache_dir().glob("*.deb"):
        (tmp_path / "cache" / package.name).symlink_to(package)
    (tmp_path / "beside").mkdir()
    out_dir = tmp_path / "beside/guest"
    again, steps = build(out_dir, agent(), cache_dir=tmp_path / "cache", offline=True)
    assert steps == list(image.STEPS)
    assert again.digest == built.digest
    assert again.initrd.read_bytes() == built.initrd.read_bytes()
    assert again.kernel.read_bytes() == built.kernel.read_bytes()
    assert left_beside(again.directory) == {".guest.lock"}


def test_a_build_of_the_same_inputs_does_nothing(built: image.GuestImage) -> None:
    before = {path.name: path.stat() for path in built.directory.iterdir()}
    again, steps = build(built.directory, agent())
    assert steps == ["resolve"]
    assert again == built
    assert {path.name: path.stat() for path in built.directory.iterdir()} == before
    assert image.is_current(again, agent_sources=agent())
    assert not image.is_current(again)  # the installed agent is another


def test_a_broken_agent_fails_the_build_and_leaves_the_image(built: image.GuestImage) -> None:
    for source, said in (("import nosuchmodule", "nosuchmodule"), ("def (", r"agent/init\.py")):
        with pytest.raises(image.GuestImageError, match=said):
            build(built.directory, agent(source))
    assert image.load(built.directory) == built
    assert left_beside(built.directory) == {".guest.lock"}


def test_a_changed_agent_or_a_damaged_image_is_built_again(built: image.GuestImage, tmp_path: Path) -> None:
    out_dir = tmp_path / "guest"
    out_dir.mkdir()
    for path in built.directory.iterdir():
        os.link(path, out_dir / path.name)
    assert build(out_dir, agent())[1] == ["resolve"]
    changed, steps = build(out_dir, agent(AGENT.replace("from busybox", "from elsewhere")))
    assert "write" in steps
    assert changed.digest != built.digest
    assert changed.agent_digest != built.agent_digest
    assert image.load(out_dir) == changed
    assert left_beside(out_dir) == {".guest.lock"}
    changed.initrd.unlink()
    with pytest.raises(image.GuestImageError, match="vcnode guest build"):
        image.load(out_dir)


@pytest.fixture
def qemu(built: image.GuestImage, vm_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The image in a VM with all the devices that ours have."""
    khz = measure_khz()
    command = [
        "qemu-system-x86_64", "-M", "microvm,accel=tcg", "-cpu", "max,-erms", "-m", "256", "-nodefaults",
        "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{vm_dir}/console.log",
        "-kernel", str(built.kernel), "-initrd", str(built.initrd),
        "-append", f"console=ttyS0 quiet panic=-1 reboot=t tsc_early_khz={khz}",
        "-device", "virtio-serial-device,id=vs0,max_ports=4",
        "-chardev", f"socket,id=ch0,path={vm_dir}/agent.sock,server=on,wait=on",
        "-device", "virtserialport,bus=vs0.0,chardev=ch0,name=vcnode.agent.0",
        "-device", "virtio-scsi-device,id=scsi0",
        "-fsdev", f"local,id=fs0,path={vm_dir}/shared,security_model=none",
        "-device", "virtio-9p-device,fsdev=fs0,mount_tag=vcnode-shared",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def connect(path: Path, process: subprocess.Popen[bytes], deadline: float) -> socket.socket:
    """QEMU's socket, as soon as QEMU has made it."""
    connection = socket.socket(socket.AF_UNIX)
    while process.poll() is None and time.monotonic() < deadline:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)  # no event tells of a socket in a directory but inotify, which Python lacks
        else:
            return connection
    connection.close()
    pytest.fail("QEMU does not listen")


@pytest.mark.vm
def test_the_image_boots_and_has_what_the_agent_needs(
    built: image.GuestImage, qemu: subprocess.Popen[bytes], vm_dir: Path
) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    text = b""
    with connect(vm_dir / "agent.sock", qemu, deadline) as connection:
        while not text.endswith(b"\n"):
            readable, _, _ = select.select([connection], [], [], max(0.0, deadline - time.monotonic()))
            received = connection.recv(65536) if readable else b""
            if not received:
                pytest.fail(
                    "the guest did not speak; its console says:\n" + (vm_dir / "console.log").read_text()
                )
            text += received
    facts = json.loads(text)
    assert facts["pid"] == 1
    assert facts["flags"] == [1, 1, 1]
    assert facts["missing"] == []
    assert facts["image"] == {"agent_version": "9.9.9", "kernel": built.kernel_release}
    assert facts["shell"] == "from busybox\n"
    assert set(facts["listed"]) == set(facts["loaded"])
    assert {"9p", "erofs", "overlay", "tmpfs", "cgroup2"} <= set(facts["filesystems"])
    assert (facts["asserts"], facts["docstring"]) == (False, None)
    assert facts["file"] == "/usr/lib/vcnode/vcnode/guest/agent/init.py"
    assert not {"site", "asyncio", "logging"} & set(facts["modules"])
