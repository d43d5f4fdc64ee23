"""Where the processes of a pod are born, and how those that help QEMU end with it."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import virtiofsd
from vcnode.drivers.hypervisor.qemu.process import adopt
from vcnode.drivers.hypervisor.qemu.spawner import SPAWNERS

VM = "vm-0123456789ab"


@pytest.fixture
def output(tmp_path: Path):
    with (tmp_path / "output").open("wb") as file:
        yield file.fileno()


@pytest.fixture
def namespace(tmp_path: Path):
    """A network namespace that a process holds open."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec sleep 100"], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    yield f"/proc/{holder.pid}/ns/net"
    holder.kill()
    holder.wait()
    holder.stdout.close()


@pytest.mark.root
@pytest.mark.parametrize("name", ["none", "nsenter"])
async def test_a_process_is_born_where_the_spawner_says(
    name: str, output: int, namespace: str, tmp_path: Path
) -> None:
    argv = ["/bin/sh", "-c", f"readlink /proc/self/ns/net > {tmp_path}/where"]
    process = SPAWNERS[name].spawn(  # type: ignore[index]
        argv, stderr_fd=output, fds=(), directory=tmp_path, netns_path=namespace
    )
    assert await asyncio.wait_for(process.wait(), 10) == 0
    wanted = namespace if name == "nsenter" else "/proc/self/ns/net"
    assert (tmp_path / "where").read_text().strip() == os.readlink(wanted)


def greet(connection: socket.socket) -> None:
    """Ask for its features and wait for the answer. Source: QEMU docs/interop/vhost-user.rst."""
    connection.settimeout(10)
    connection.sendall(struct.pack("<III", 1, 1, 0))
    assert connection.recv(20, socket.MSG_WAITALL)[:4] == struct.pack("<I", 1)


@pytest.mark.root
async def test_virtiofsd_serves_one_connection_and_ends_with_it(output: int, tmp_path: Path) -> None:
    directory = tmp_path / "vms" / VM
    (directory / "data").mkdir(parents=True)
    process, connection = virtiofsd.start(
        SPAWNERS["none"],
        virtiofsd.find() or "",
        str(directory / "data"),
        stderr_fd=output,
        vm_dir=directory,
        netns_path=None,
    )
    with connection:
        assert list(directory.glob("*.sock")) == []
        # Ready, or it would not answer: by now it has left its working directory.
        await asyncio.to_thread(greet, connection)
        [found] = virtiofsd.named(tmp_path / "vms", "vm-")
        assert (found.pid, found.vm_id) == (process.pid, VM)
        assert virtiofsd.named(tmp_path, "vm-") == virtiofsd.named(tmp_path / "vms", "other") == []
        again = adopt(found.pid, found.start_ticks)
        assert again is not None
        again.release()
    assert await process.ended_within(10)
    assert virtiofsd.named(tmp_path / "vms", "vm-") == []


def test_both_programs_of_that_name_are_spoken_to() -> None:
    rust = virtiofsd.command("/usr/libexec/virtiofsd", 7, "/d")
    assert rust == ["/usr/libexec/virtiofsd", "--fd=7", "--shared-dir=/d", "--sandbox=namespace"]
    own = virtiofsd.command(virtiofsd.QEMUS_OWN, 7, "/d")
    assert own[1:] == ["--fd=7", "-o", "source=/d", "-o", "sandbox=namespace"]
