"""Streams from the command line to a process in a real VM: terminals, files and ports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pexpect
import pytest

from tests.integration.guest_here import make_busybox
from tests.support.nats import NatsServer
from vcnode.client import Client, NodeClient
from vcnode.errors import FailedPreconditionError
from vcnode.models.network import NetworkModel
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.node import running
from vcnode.settings import NatsSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.nats, pytest.mark.timeout(300)]

LIMIT_S = 60
VCNODE = str(Path(sys.executable).with_name("vcnode"))
SERVER = """
import socket
listening = socket.socket()
listening.bind(("127.0.0.1", 7000))
listening.listen()
print("up", flush=True)
for _ in range(2):
    here, _ = listening.accept()
    while data := here.recv(65536):
        here.sendall(data)
    here.sendall(b"end")
    here.close()
"""


class Rig:
    """A node agent with a pod in a VM, a client, and the command."""

    def __init__(self, node: NodeClient, url: str, scratch: Path) -> None:
        self.node = node
        self.scratch = scratch
        self.env = {**os.environ, "VCNODE_NATS_URL": url, "VCNODE_NODE": node.name, "TERM": "xterm"}

    def terminal(self, *arguments: str) -> pexpect.spawn[str]:
        """A shell on a terminal of its own that runs ``vcnode ARGUMENTS`` and tells how it ended."""
        words = " ".join(arguments)
        script = f"A=$(stty -g); {VCNODE} {words}; echo code=$?; test $A = $(stty -g) && echo restored"
        return pexpect.spawn(
            "/bin/sh", ["-c", script], env=self.env, encoding="utf-8", timeout=LIMIT_S, dimensions=(30, 90)
        )

    async def run(self, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """``vcnode ARGUMENTS``: exit code and both outputs."""
        process = await asyncio.create_subprocess_exec(
            VCNODE, *arguments, env=self.env, stdin=-1, stdout=-1, stderr=-1
        )
        out, err = await asyncio.wait_for(process.communicate(stdin), LIMIT_S)
        return process.returncode or 0, out, err


async def test_streams(guest_image: Path, nats_server: NatsServer, short_dir: Path) -> None:
    make_busybox(short_dir / "box")
    settings = Settings(
        node_name="streams",
        state_dir=short_dir / "s",
        run_dir=short_dir / "r",
        guest_dir=guest_image,
        allowed_roots=(short_dir,),
        metrics_address="",
        network=NetworkModel.NOOP,
        qemu=QemuSettings(accel="tcg"),
        nats=NatsSettings(url=nats_server.url),
    )
    async with running(settings) as node:
        await node.connection.wait_connected()
        async with await Client.connect(nats_server.url) as client:
            rig = Rig(client.node("streams"), nats_server.url, short_dir)
            sleeper = Cmd(args=("sleep", "infinity"))
            main = ContainerSpec(id="main", rootfs=str(short_dir / "box"), cmd=sleeper)
            await rig.node.pod_run(PodSpec(id="p1", template="never", containers=(main,)), deadline_s=200)
            try:
                await asyncio.to_thread(feels_like_a_shell, rig)
                await asyncio.to_thread(restores_the_terminal_when_it_is_killed, rig)
                await asyncio.to_thread(detaches_and_resumes, rig)
                talk = Cmd(args=("sh", "-c", "while read x; do echo got $x; done"))
                given = {"id": "talk", "rootfs": main.rootfs, "cmd": talk, "stdin": True, "tty": True}
                await rig.node.container_create("p1", ContainerSpec(**given))
                await rig.node.container_start("p1", "talk")
                await asyncio.to_thread(attaches, rig)
                await carries_every_byte(rig)
                await fifty_at_once(rig)
                await copies_files(rig)
                await forwards_ports(rig)
                async with asyncio.timeout(LIMIT_S):
                    while (await rig.node.session_list()).sessions:  # noqa: ASYNC110 -- nobody announces it
                        await asyncio.sleep(0.1)
            finally:
                await rig.node.pod_delete("p1", force=True)


def feels_like_a_shell(rig: Rig) -> None:
    """Keys, size, Ctrl-C and exit code."""
    with contextlib.closing(rig.terminal("container exec -it p1 main -- sh")) as shell:
        shell.sendline("stty size; tty")
        shell.expect("30 90\r\n/dev/pts/0")
        shell.setwinsize(44, 123)
        shell.sendline("sleep 100; echo slept $?")
        shell.expect("slept [$]")  # the echo of the line
        shell.send("\x03")
        shell.sendline("")
        shell.sendline("stty size")
        shell.expect("44 123")
        shell.sendline("exit 7")
        shell.expect("code=7\r\nrestored")
        shell.expect(pexpect.EOF)


def restores_the_terminal_when_it_is_killed(rig: Rig) -> None:
    """SIGTERM, as from a closed window, in the middle of raw mode."""
    with contextlib.closing(rig.terminal("exec -it p1 main sh -c 'echo pid; cat'")) as shell:
        shell.expect("pid\r\n")
        [child] = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        shell.expect("code=143\r\nrestored")
        shell.expect(pexpect.EOF)


def detaches_and_resumes(rig: Rig) -> None:
    """Ctrl-P Ctrl-Q, and what the program says meanwhile."""
    with contextlib.closing(
        rig.terminal("exec -it p1 main sh -c 'echo begun; read line; echo got $line; exit 5'")
    ) as first:
        first.expect("begun\r\n")
        first.send("\x10\x11")
        first.expect("vcnode session resume ([0-9a-f]{32})")
        session_id = first.match.group(1)
        first.expect("code=0\r\nrestored")
    with contextlib.closing(rig.terminal(f"session resume -i {session_id}")) as second:
        second.sendline("again")
        second.expect("got again")
        second.expect("code=5\r\nrestored")


def attaches(rig: Rig) -> None:
    """A container with a terminal: left with the keys, found again, ended by Ctrl-C."""
    with contextlib.closing(rig.terminal("attach -i p1 talk")) as first:
        first.sendline("one")
        first.expect("got one")
        first.send("\x10\x11")
        first.expect("detached\r\ncode=0\r\nrestored")
    with contextlib.closing(rig.terminal("attach -i p1 talk")) as second:
        second.sendline("two")
        second.expect("got two")
        second.send("\x03")
        second.expect("code=130\r\nrestored")


async def carries_every_byte(rig: Rig) -> None:
    """Through pipes, unchanged, and the exit code with it."""
    data = bytes(range(256)) * 8192
    code, out, err = await rig.run("exec", "-i", "p1", "main", "sh", "-c", "cat; exit 9", stdin=data)
    assert (code, err) == (9, b"")
    assert out == data
    code, _, err = await rig.run("exec", "p1", "nope", "true")
    assert code == 125
    assert b"nope" in err


async def fifty_at_once(rig: Rig) -> None:
    """Each gets its own bytes back."""

    async def one(number: int) -> bytes:
        async with rig.node.exec_stream("p1", "main", ["cat"], deadline_s=LIMIT_S) as process:
            await process.stdin.write(bytes([number]) * 20_000)
            await process.stdin.close()
            got = b"".join([chunk async for _, chunk in process.output()])
            assert await process.wait() == 0
            return got

    got = await asyncio.gather(*(one(number) for number in range(50)))
    assert got == [bytes([number]) * 20_000 for number in range(50)]


async def copies_files(rig: Rig) -> None:
    """In, out, under other names, and as streams."""
    here = rig.scratch / "here"
    (here / "sub").mkdir(parents=True)
    (here / "sub" / "data").write_bytes(os.urandom(500_000))
    (here / "link").symlink_to("sub/data")
    (here / "run").write_text("#!/bin/sh\n")
    (here / "run").chmod(0o750)
    assert await rig.run("cp", str(here), "p1/main:/dev/shm/there") == (0, b"", b"")
    assert await rig.run("cp", str(here / "run"), "p1/main:/dev/shm/there/sub") == (0, b"", b"")
    code, out, _ = await rig.run("container", "exec", "p1", "main", "ls", "-R", "/dev/shm/there")
    assert (code, b"sub:\ndata\nrun" in out) == (0, True)
    back = rig.scratch / "back"
    assert await rig.run("cp", "p1/main:/dev/shm/there", str(back)) == (0, b"", b"")
    assert (back / "sub/data").read_bytes() == (here / "sub/data").read_bytes()
    assert (back / "link").readlink() == Path("sub/data")
    assert (back / "run").stat().st_mode == (here / "run").stat().st_mode
    code, out, _ = await rig.run("cp", "p1/main:/dev/shm/there/run", "-")
    assert code == 0
    (rig.scratch / "one.tar").write_bytes(out)
    with tarfile.open(rig.scratch / "one.tar") as archive:
        assert archive.getnames() == ["run"]
    code, _, err = await rig.run("cp", "p1/main:/no/such", str(back))
    assert code == 3
    assert b"/no/such" in err


async def forwards_ports(rig: Rig) -> None:
    """Two connections after one another, half closed, through ``vcnode port-forward``; and one that fails."""
    python = ["/usr/bin/python3", "-ISB", "-c", SERVER]
    async with rig.node.exec_stream("p1", None, python) as server, _forwarder(rig) as port:
        assert await anext(server.output()) == ("stdout", b"up\n")
        for payload in (b"x", os.urandom(700_000)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def send(writer: asyncio.StreamWriter, payload: bytes) -> None:
                writer.write(payload)
                await writer.drain()
                writer.write_eof()

            async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
                group.create_task(send(writer, payload))
                assert await reader.read() == payload + b"end"
            writer.close()
    async with rig.node.forward("p1") as session:
        with pytest.raises(FailedPreconditionError, match="refused"):
            await session.connect(7001)


@contextlib.asynccontextmanager
async def _forwarder(rig: Rig) -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec(
        VCNODE, "port-forward", "p1", "0:7000", env=rig.env, stderr=-1
    )
    try:
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), LIMIT_S)
        yield int(line.decode().split(" ")[0].rpartition(":")[2])
    finally:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 130
