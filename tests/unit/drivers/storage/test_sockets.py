"""Sockets on the host that lead into VMs, and shares that are read-only."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from vcnode.drivers.storage.local import LocalStorage
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, StorageError

pytestmark = pytest.mark.root
VM = "vm-0123456789ab"


@pytest.fixture
async def storage(host):
    made = LocalStorage(host.roots.parent / "state", host.run, [host.roots])
    await made.make_vm_dir(VM)
    yield made
    await made.remove_vm_dir(VM)


def client(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


async def test_a_socket_is_for_root_and_goes_with_the_vm(storage, host):
    path = host.roots / "vm.sock"
    fd = await storage.listen(VM, str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client(path).close()
    assert [(h.name, h.vm_id) for h in await storage.held("vm-") if h.kind == "socket"] == [(str(path), VM)]
    with pytest.raises(FailedPreconditionError, match="already"):
        await storage.listen(VM, str(path))
    os.close(fd)
    await storage.remove_vm_dir(VM)
    assert not path.exists()


async def test_what_a_crash_has_left_is_replaced(storage, host):
    path = host.roots / "vm.sock"
    os.close(await storage.listen(VM, str(path)))
    fd = await storage.listen(VM, str(path))
    client(path).close()
    os.close(fd)


async def test_what_others_have_put_there_stays(storage, host):
    """A live socket in the place of ours, a plain file, a link: none of them is removed or listened at."""
    path = host.roots / "vm.sock"
    os.close(await storage.listen(VM, str(path)))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        await storage.remove_vm_dir(VM)
        client(path).close()
    await storage.make_vm_dir(VM)
    for name, make in (
        ("file", lambda p: p.write_text("x")),
        ("link", lambda p: p.symlink_to(host.precious)),
    ):
        make(host.roots / name)
        with pytest.raises(FailedPreconditionError):
            await storage.listen(VM, str(host.roots / name))
    assert (host.roots / "file").read_text() == "x"


async def test_sockets_stay_below_the_allowed_roots(storage, host):
    (host.roots / "out").symlink_to(host.precious)
    for path in (
        f"{host.precious}/x.sock",
        f"{host.roots}/out/x.sock",
        f"{host.roots}/app/../../x",
        "x.sock",
    ):
        with pytest.raises(InvalidArgumentError):
            await storage.listen(VM, path)
    with pytest.raises(NotFoundError):
        await storage.listen(VM, f"{host.roots}/missing/x.sock")
    with pytest.raises(InvalidArgumentError, match="at most 107"):
        await storage.listen(VM, f"{host.roots}/{'x' * 108}")
    with pytest.raises(StorageError):
        await storage.listen("vm-ba9876543210", f"{host.roots}/x.sock")
    assert not list(host.precious.glob("*.sock"))


async def test_a_directory_swapped_for_a_link_leads_nowhere_else(storage, host, monkeypatch):
    """Between the look and the act, whether that makes a socket, opens a disk, or shares a directory."""
    inner = host.roots / "inner"
    real = os.path.realpath

    def swapping(path, **options):
        found = real(path, **options)
        if str(path).startswith(str(inner)) and inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner)
            inner.symlink_to(host.precious)
        return found

    for act in (
        lambda: storage.listen(VM, f"{inner}/d/vm.sock"),
        lambda: storage.open_file(f"{inner}/d/disk", writable=True),
        lambda: storage.share(VM, "volume.x", f"{inner}/d", read_only=True),
        lambda: storage.connect(f"{inner}/d/disk"),
    ):
        inner.unlink(missing_ok=True)
        (inner / "d").mkdir(parents=True)
        (inner / "d" / "disk").write_text("disk")
        with monkeypatch.context() as patched:
            patched.setattr(os.path, "realpath", swapping)
            with pytest.raises(InvalidArgumentError, match="changed while"):
                await act()


async def test_connecting_to_a_program_of_the_host(storage, host):
    path = host.roots / "here.sock"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        with pytest.raises(FailedPreconditionError, match="start the program"):
            await storage.connect(str(path))
        theirs.listen()
        fd = await storage.connect(str(path))
        accepted, _ = theirs.accept()
        os.write(fd, b"hello")
        assert accepted.recv(5) == b"hello"
        accepted.close()
        os.close(fd)
    (host.roots / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="no socket"):
        await storage.connect(str(host.roots / "file"))


async def test_a_read_only_share_cannot_be_written_to_by_anybody(storage, host):
    await storage.share(VM, "volume.a", str(host.roots / "app"), read_only=True)
    shared = host.run / "vms" / VM / "shared" / "volume.a"
    assert os.statvfs(shared).f_flag & os.ST_RDONLY
    with pytest.raises(OSError, match="Read-only"):
        (shared / "new").write_text("x")
    (host.roots / "app" / "new").write_text("x")
    assert (shared / "new").read_text() == "x"


async def test_a_file_is_opened_for_writing_only_if_that_is_wanted(storage, host):
    (host.roots / "disk").write_text("disk")
    fd = await storage.open_file(str(host.roots / "disk"), writable=True)
    os.write(fd, b"DISK")
    os.close(fd)
    fd = await storage.open_file(str(host.roots / "disk"))
    with pytest.raises(OSError, match="Bad file"):
        os.write(fd, b"x")
    os.close(fd)
