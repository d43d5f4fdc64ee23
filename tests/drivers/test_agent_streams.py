"""Terminals, files and ports of guests: the real agent in a VM, and the mock as far as it goes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.drivers import test_agent_conformance as conformance
from tests.drivers.test_agent_conformance import LIMIT_S, Rig, execute, outcome, run
from vcnode.drivers.base import GuestSession, RunningProcess
from vcnode.errors import FailedPreconditionError, NotFoundError
from vcnode.models.vm import GuestProcess

pytestmark = pytest.mark.timeout(240)

agent_socket, rig, session = conformance.agent_socket, conformance.rig, conformance.session
native = pytest.mark.parametrize("rig", [pytest.param("native", marks=pytest.mark.vm)], indirect=True)


async def on_terminal(session: GuestSession, cid: str, script: str, **options: Any) -> RunningProcess:
    process = GuestProcess(args=("sh", "-c", script), **options)
    return await session.execute(process, container_id=cid, tty=(33, 101), timeout_s=LIMIT_S)


class Screen:
    """What a process has written so far."""

    def __init__(self, process: RunningProcess, *, errors: bool = False) -> None:
        self._errors = errors
        self._chunks: AsyncIterator[Any] = process.output().__aiter__()
        self.text = b""

    async def until(self, wanted: bytes) -> None:
        async with asyncio.timeout(LIMIT_S):
            while wanted not in self.text:
                name, data = await anext(self._chunks)
                assert name == "stdout" or self._errors, data
                self.text += data


@native
async def test_a_terminal_is_one_with_a_size_and_a_name(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    script = "stty size; tty; test -t 0 && test -t 1 && test -t 2 && echo all; echo $TERM; echo err >&2"
    exit_code, out, err = await outcome(await on_terminal(session, cid, script))
    assert (exit_code, err) == (0, b"")
    assert out == b"33 101\r\n/dev/pts/0\r\nall\r\nxterm\r\nerr\r\n"


@native
async def test_keys_reach_the_program_and_ctrl_c_is_a_signal(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    script = "trap 'echo caught; exit 3' INT; trap 'stty size' WINCH; echo ready; while :; do read x; done"
    process = await on_terminal(session, cid, script, user="1000")
    screen = Screen(process)
    await screen.until(b"ready")
    await process.resize(50, 132)
    await process.write_stdin(b"x\n")
    await screen.until(b"50 132")
    await process.write_stdin(b"\x03")
    await screen.until(b"caught")
    assert (await process.wait()).exit_code == 3


@native
async def test_the_end_of_a_long_output_on_a_terminal_comes(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    _, out, _ = await outcome(await on_terminal(session, cid, "seq 1 3000; printf end"))
    assert out.endswith(b"\r\n3000\r\nend")
    assert out.count(b"\n") == 3000


@native
async def test_a_terminal_of_the_guest_itself(rig: Rig, session: GuestSession) -> None:
    process = GuestProcess(args=("tty",))
    running = await session.execute(process, container_id=None, tty=(24, 80), timeout_s=LIMIT_S)
    code, out, _ = await outcome(running)
    assert (code, out[:9]) == (0, b"/dev/pts/")


@native
async def test_killing_what_has_a_terminal_ends_it_all(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    process = await on_terminal(session, cid, "sleep 1000 & echo up; sleep 1000")
    await Screen(process).until(b"up")
    await process.close()
    async with asyncio.timeout(LIMIT_S):
        assert (await process.wait()).exit_code == 137


# -- attach ----------------------------------------------------------------------------------------


async def attached_to(
    rig: Rig, session: GuestSession, script: str, **fields: Any
) -> tuple[str, RunningProcess]:
    """A running container of that script, and somebody attached to it."""
    cid = rig.new_id()
    spec = conformance.container(cid, "sh", "-c", script).model_copy(update=fields)
    await session.create_container(spec, timeout_s=LIMIT_S)
    await session.start_container(cid, timeout_s=LIMIT_S)
    return cid, await session.attach(cid, tty=bool(fields.get("tty")), timeout_s=LIMIT_S)


@native
async def test_who_is_attached_talks_with_the_main_process(rig: Rig, session: GuestSession) -> None:
    script = "while read line; do echo got $line; echo err >&2; done; exit 4"
    cid, first = await attached_to(rig, session, script, stdin=True)
    second = await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    await second.write_stdin(b"one\n")
    await Screen(second, errors=True).until(b"err")
    await second.close()  # detaches, and ends nothing
    assert (await second.wait()).exit_code == 0
    await first.write_stdin(b"two\n")
    await first.close_stdin()
    code, out, err = await outcome(first)
    assert (code, out, err) == (4, b"got one\ngot two\n", b"err\nerr\n")
    with pytest.raises(FailedPreconditionError):
        await session.attach(cid, tty=False, timeout_s=LIMIT_S)


@native
async def test_a_main_process_can_have_a_terminal(rig: Rig, session: GuestSession) -> None:
    # The kernel keeps from process 1 of a namespace what it has no handler for.
    script = "trap 'exit 130' INT; read line; stty size; echo got $line; read line"
    cid, process = await attached_to(rig, session, script, stdin=True, tty=True)
    await process.resize(40, 100)
    await process.write_stdin(b"x\n")
    await Screen(process).until(b"40 100\r\ngot x")
    await process.write_stdin(b"\x03")
    assert (await process.wait()).exit_code == 130
    assert (await conformance.state_of(session, cid)).exit_code == 130


@native
async def test_who_does_not_read_holds_up_what_he_is_attached_to(rig: Rig, session: GuestSession) -> None:
    script = "read go; i=0; while [ $i -lt 100 ]; do head -c 20000 /dev/zero; i=$((i+1)); done; echo >&2 done"
    cid, slow = await attached_to(rig, session, script, stdin=True)
    free = await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    await slow.write_stdin(b"go\n")
    got = 0
    async with asyncio.timeout(LIMIT_S):
        async for _, data in free.output():
            got += len(data)
            if got > 200_000:
                break
    assert (await conformance.state_of(session, cid)).state == "running"
    await slow.close()  # now nobody holds it up
    code, _, _ = await outcome(free)
    assert code == 0


async def test_the_end_of_a_container_reaches_who_is_attached(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    process = await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    await process.signal(9)
    async with asyncio.timeout(LIMIT_S):
        assert (await process.wait()).exit_code == 137


async def test_a_lost_session_leaves_the_main_process_alone(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    await session.close()
    again = await rig.connect()
    assert (await conformance.state_of(again, cid)).state == "running"


# -- files -----------------------------------------------------------------------------------------


def archive(*entries: tuple[dict[str, Any], bytes]) -> bytes:
    """A tar archive of entries, given by the fields of their headers."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as made:
        for fields, content in entries:
            entry = tarfile.TarInfo()
            for name, value in {
                "mode": 0o644,
                "mtime": 1_000_000_000,
                "size": len(content),
                **fields,
            }.items():
                setattr(entry, name, value)
            made.addfile(entry, io.BytesIO(content))
    return raw.getvalue()


async def copy_in(session: GuestSession, cid: str, path: str, data: bytes, limit: int = 1 << 30) -> Any:
    process = await session.copy("in", container_id=cid, path=path, max_bytes=limit, timeout_s=LIMIT_S)

    async def feed() -> None:
        await process.write_stdin(data)
        await process.close_stdin()

    async with asyncio.TaskGroup() as group:
        group.create_task(feed())
        code, _, err = await outcome(process)
    return None if code == 0 else json.loads(err)[0] if json.loads(err)[0] != "internal" else err


async def copy_out(session: GuestSession, cid: str, path: str, limit: int = 1 << 30) -> Any:
    process = await session.copy("out", container_id=cid, path=path, max_bytes=limit, timeout_s=LIMIT_S)
    await process.close_stdin()
    code, out, err = await outcome(process)
    return out if code == 0 else json.loads(err)[0]


@native
@pytest.mark.parametrize("runs", [True, False], ids=["running", "created"])
async def test_what_is_copied_in_comes_out_as_it_was(rig: Rig, session: GuestSession, runs: bool) -> None:
    cid = await (rig.running(session) if runs else rig.create(session, "true"))
    content = os.urandom(300_000)
    sent = archive(
        ({"name": "d", "type": tarfile.DIRTYPE, "mode": 0o2750, "uid": 12, "gid": 34}, b""),
        ({"name": "d/file", "mode": 0o4711, "uid": 12, "gid": 34}, content),
        ({"name": "d/hard", "type": tarfile.LNKTYPE, "linkname": "d/file"}, b""),
        ({"name": "d/soft", "type": tarfile.SYMTYPE, "linkname": "../../nowhere", "uid": 5}, b""),
        ({"name": "d/" + "long" * 60, "pax_headers": {}}, b"x"),
    )
    assert await copy_in(session, cid, "/tmp/../", sent) is None
    with tarfile.open(fileobj=io.BytesIO(await copy_out(session, cid, "/d"))) as got:
        found = {entry.name: entry for entry in got}
        assert set(found) == {"d", "d/file", "d/hard", "d/soft", "d/" + "long" * 60}
        assert (found["d"].mode, found["d"].uid, found["d"].gid) == (0o2750, 12, 34)
        assert found["d"].mtime == found["d/file"].mtime == 1_000_000_000
        first, second = sorted((found["d/file"], found["d/hard"]), key=lambda entry: entry.islnk())
        assert second.islnk()
        assert second.linkname == first.name
        assert first.mode == 0o4711
        whole = got.extractfile(first)
        assert whole is not None
        assert whole.read() == content
        assert (found["d/soft"].linkname, found["d/soft"].uid) == ("../../nowhere", 5)
    await session.delete_container(cid, timeout_s=LIMIT_S)


@native
async def test_one_file_can_get_another_name(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    assert await copy_in(session, cid, "/tmp/other", archive(({"name": "file"}, b"hello"))) is None
    # Not on the shared directory, where the host's side cannot set the facts of a FIFO.
    pipe = archive(({"name": "pipe", "type": tarfile.FIFOTYPE}, b""))
    assert await copy_in(session, cid, "/dev/shm", pipe) is None
    assert await run(session, cid, "test", "-p", "/dev/shm/pipe") == (0, b"", b"")
    assert await run(session, cid, "cat", "/tmp/other") == (0, b"hello", b"")
    assert await copy_in(session, cid, "/no/where", archive(({"name": "file"}, b"hello"))) == "not_found"
    assert await copy_out(session, cid, "/no/where") == "not_found"


@native
async def test_nothing_in_an_archive_leads_out_of_the_container(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    await run(session, cid, "mkdir", "-p", "/into")
    for name in ("../evil", "a/../../evil", "..", "/../evil"):
        assert await copy_in(session, cid, "/into", archive(({"name": name}, b"x"))) == "invalid_argument"
    hard = archive(({"name": "h", "type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"}, b""))
    assert await copy_in(session, cid, "/into", hard) == "invalid_argument"
    # A link first, and then through it: it leads where the container's own programs would get.
    through = archive(
        ({"name": "up", "type": tarfile.SYMTYPE, "linkname": "/../../../../run"}, b""),
        ({"name": "up/vcnode-was-here"}, b"x"),
    )
    await copy_in(session, cid, "/into", through)
    proc = archive(
        ({"name": "root", "type": tarfile.SYMTYPE, "linkname": "/proc/1/root/.."}, b""),
        ({"name": "root/vcnode-was-here-too"}, b"x"),
    )
    await copy_in(session, cid, "/into", proc)
    code, out, _ = await run(session, None, "sh", "-c", "ls -d /run/vcnode-was* /vcnode-was* 2>/dev/null")
    assert (code, out) != (0, b"")
    assert b"vcnode-was" not in out
    device = archive(({"name": "disk", "type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0}, b""))
    assert await copy_in(session, cid, "/into", device) is not None
    assert await copy_in(session, cid, "/into", b"this is no archive" * 100) == "invalid_argument"
    assert await copy_in(session, cid, "/into", archive(({"name": "big"}, bytes(5000))), 4999) == (
        "failed_precondition"
    )
    assert await copy_out(session, cid, "/bin", 10) == "failed_precondition"


@native
async def test_a_link_in_the_way_is_replaced_and_not_followed(rig: Rig, session: GuestSession) -> None:
    cid = await rig.running(session)
    await run(session, cid, "sh", "-c", "mkdir -p /w; echo kept >/w/target; ln -s target /w/link")
    assert await copy_in(session, cid, "/w", archive(({"name": "link"}, b"new"))) is None
    assert await run(session, cid, "cat", "/w/target", "/w/link") == (0, b"kept\nnew", b"")


async def test_a_copy_of_no_container_is_refused(rig: Rig, session: GuestSession) -> None:
    with pytest.raises(NotFoundError):
        await session.copy("out", container_id="nope", path="/", max_bytes=1, timeout_s=LIMIT_S)


SERVER = """
import socket
listening = socket.socket()
listening.bind(("127.0.0.1", 7000))
listening.listen()
print("up", flush=True)
here, _ = listening.accept()
while data := here.recv(65536):
    here.sendall(data)
here.sendall(b"end")
"""

# -- ports -----------------------------------------------------------------------------------------


@native
async def test_a_port_of_the_pod_with_half_close(rig: Rig, session: GuestSession) -> None:
    server = await execute(session, None, "/usr/bin/python3", "-ISB", "-c", SERVER)
    await Screen(server).until(b"up")
    connection = await session.connect_port(7000, timeout_s=LIMIT_S)
    await connection.write(b"ping" * 50_000)
    await connection.close_write()
    got = b"".join([data async for data in connection.received()])
    assert got == b"ping" * 50_000 + b"end"
    await connection.close()
    await server.close()


async def test_a_port_where_nobody_listens_is_refused(rig: Rig, session: GuestSession) -> None:
    with pytest.raises(FailedPreconditionError, match="refused"):
        await session.connect_port(1, timeout_s=LIMIT_S)
    await session.ping(timeout_s=LIMIT_S)
