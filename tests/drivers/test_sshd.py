"""The agent sshd against a real OpenSSH server on the loopback."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest

from tests.support.sshd import SSHD, Server, make_key, openssh
from tests.unit.drivers.agent.guests import LIMIT_S, FakeVm
from vcnode.drivers.agent.sshd import SshdAgent, keys
from vcnode.drivers.agent.sshd.agent import Attempts
from vcnode.drivers.agent.sshd.session import SshdSession
from vcnode.drivers.base import AgentAccess, GuestSession, RunningProcess, SessionLost
from vcnode.errors import (
    AgentError,
    FailedPreconditionError,
    InvalidArgumentError,
    StorageError,
    UnsupportedError,
)
from vcnode.models.capabilities import ALL_CAPABILITIES
from vcnode.models.pod import AgentConfig
from vcnode.models.sshd import SshdConfig
from vcnode.models.vm import GuestProcess

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(60),
    pytest.mark.skipif(not Path(SSHD).exists(), reason="no openssh-server: run dev/setup --tests"),
]

VM = FakeVm(Path("/nowhere")).as_vm


@pytest.fixture
async def server(short_dir: Path) -> AsyncIterator[Server]:
    async with openssh(short_dir, make_key(short_dir / "id")) as running:
        yield running


def access(server: Server, *, host_key: str | None = None, config_host_key: str | None = None) -> AgentAccess:
    return AgentAccess(
        AgentConfig(sshd=SshdConfig(server="127.0.0.1", port=server.port, host_key=config_host_key)),
        private_key=(server.directory / "id").read_bytes(),
        host_key=host_key,
    )


@pytest.fixture
async def session(server: Server, short_dir: Path) -> AsyncIterator[GuestSession]:
    opened = await SshdAgent(short_dir).connect(VM, access=access(server), timeout_s=LIMIT_S)
    yield opened
    await opened.close()


def process(*args: str, **fields: object) -> GuestProcess:
    return GuestProcess.model_validate(
        {"args": args, "user": "", "capabilities": ALL_CAPABILITIES, **fields}, strict=False
    )


async def outcome(running: RunningProcess) -> tuple[int, bytes, bytes]:
    streams = {"stdout": b"", "stderr": b""}
    async for name, data in running.output():
        streams[name] += data
    code = (await running.wait()).exit_code
    await running.close()
    return code, streams["stdout"], streams["stderr"]


async def run(session: GuestSession, *args: str, **fields: object) -> tuple[int, bytes, bytes]:
    started = await session.execute(process(*args, **fields), container_id=None, timeout_s=LIMIT_S)
    await started.close_stdin()
    return await outcome(started)


async def test_it_says_what_it_has_found(session: GuestSession, server: Server):
    assert session.info.kernel == os.uname().release
    assert session.info.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert session.info.host_key == server.host_key
    assert "OpenSSH" in session.info.agent_version


async def test_exec(session: GuestSession):
    table: list[tuple[tuple[str, ...], tuple[int, bytes, bytes]]] = [
        (("sh", "-c", "echo out; echo err >&2; exit 7"), (7, b"out\n", b"err\n")),
        (("printf", "%s|", "a b", "$HOME", "'\"\\", "", "\n"), (0, b"a b|$HOME|'\"\\||\n|", b"")),
        (("sh", "-c", "kill -9 $$"), (137, b"", b"")),
        (("sh", "-c", "kill -USR1 $$"), (138, b"", b"")),
        (("true",), (0, b"", b"")),
    ]
    for args, expected in table:
        assert await run(session, *args) == expected
    for program, code in (("no-such-program", 127), ("/etc/passwd", 126)):
        exit_code, out, err = await run(session, program)
        assert (exit_code, out) == (code, b"")
        assert program.encode() in err


async def test_stdin_in_large_pieces_comes_back_whole(session: GuestSession):
    running = await session.execute(process("cat"), container_id=None, timeout_s=LIMIT_S)
    sent = os.urandom(3_000_000)

    async def feed() -> None:
        for at in range(0, len(sent), 300_000):
            await running.write_stdin(sent[at : at + 300_000])
        await running.close_stdin()

    feeding = asyncio.ensure_future(feed())
    code, out, _ = await outcome(running)
    await feeding
    assert (code, out == sent) == (0, True)


async def test_unread_output_stops_the_process_and_not_the_session(session: GuestSession):
    endless = await session.execute(process("yes"), container_id=None, timeout_s=LIMIT_S)
    code, out, _ = await run(session, "echo", "on")
    assert (code, out) == (0, b"on\n")
    await endless.close()
    assert (await endless.wait()).exit_code == 137


async def test_environment_workdir_and_limits(session: GuestSession, short_dir: Path):
    made = short_dir / "a b"
    script = 'echo "$PWD|$GREETING|$(ulimit -n)"'
    code, out, err = await run(
        session,
        *("sh", "-c", script),
        workdir=str(made),
        envs=(("GREETING", "it's\n$x"),),
        rlimits=(("nofile", 64, 128),),
    )
    assert (code, err) == (0, b"")
    assert out.decode() == f"{made}|it's\n$x|64\n"


async def test_a_workdir_that_cannot_be(session: GuestSession):
    code, out, err = await run(session, "true", workdir="/etc/passwd/x")
    assert (code, out) == (126, b"")
    assert b"/etc/passwd" in err


async def test_users_and_groups(session: GuestSession):
    nobody = pwd.getpwnam("nobody")
    table: list[tuple[dict[str, object], str]] = [
        ({"user": "nobody"}, f"{nobody.pw_uid} {nobody.pw_gid}"),
        ({"user": "4711"}, "4711 0"),
        ({"user": "nobody", "group": "4712"}, f"{nobody.pw_uid} 4712"),
        ({"user": "root"}, "0 0"),
        ({"user": "0", "group": "4712", "supplementary_groups": ("4713",)}, "0 4712"),
    ]
    for fields, expected in table:
        script = "echo $(id -u) $(id -g); id -G; grep NoNewPrivs /proc/self/status"
        code, out, err = await run(session, "sh", "-c", script, **fields)
        assert (code, err) == (0, b"")
        numbers, groups, no_new_privileges = out.decode().splitlines()
        assert numbers == expected
        assert ("4713" in groups.split()) is ("supplementary_groups" in fields)
        # Of root, who has all capabilities, it would take nothing.
        assert no_new_privileges.split()[-1] == ("0" if expected.startswith("0 ") else "1")


async def test_capabilities_taken_from_root(session: GuestSession):
    kept = ("CAP_CHOWN", "CAP_NET_RAW")
    code, out, err = await run(session, "grep", "CapEff", "/proc/self/status", capabilities=kept)
    assert (code, err) == (0, b"")
    assert int(out.split()[-1], 16) == 1 << 0 | 1 << 13  # Source: linux/capability.h


async def test_a_terminal(session: GuestSession):
    shell = process("sh", "-c", "stty size; read line; echo got $line; stty size; exit 3")
    running = await session.execute(shell, container_id=None, tty=(24, 81), timeout_s=LIMIT_S)
    seen = b""

    async def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += (await anext(output))[1]

    output = running.output()
    await until(b"24 81\r\n")
    assert seen == b"24 81\r\n", "the word that comes first is not the process's"
    await running.resize(30, 90)
    await running.write_stdin(b"hello\r")
    await until(b"got hello\r\n30 90\r\n")
    assert (await running.wait()).exit_code == 3


async def test_a_signal_reaches_what_the_process_has_started(session: GuestSession):
    script = 'trap "echo asked; exit 5" TERM; sleep 1000 & echo $!; wait'
    running = await session.execute(process("sh", "-c", script), container_id=None, timeout_s=LIMIT_S)
    output = running.output()
    _, first = await anext(output)
    child = int(first)
    await running.signal(15)
    assert [data async for _, data in output] == [b"asked\n"]
    assert (await running.wait()).exit_code == 5
    assert not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text()
    await running.signal(15)  # it has ended: nothing
    with pytest.raises(InvalidArgumentError):
        await running.signal(65)
    await running.close()


async def test_connections_into_the_guest(session: GuestSession):
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    connection = await session.connect_port(port, timeout_s=LIMIT_S)
    await connection.write(b"ping")
    await connection.close_write()
    assert b"".join([data async for data in connection.received()]) == b"ping"
    await connection.close()
    listening.close()
    await listening.wait_closed()
    with pytest.raises(FailedPreconditionError):
        await session.connect_port(port, timeout_s=LIMIT_S)


async def test_what_is_not_supported_is_refused(session: GuestSession):
    assert isinstance(session, SshdSession)
    assert session._login is not None
    session._login = replace(session._login, tools=frozenset())  # this host may have a runtime
    with pytest.raises(UnsupportedError, match="no runtime for containers"):
        await session.execute(process("true"), container_id="c", timeout_s=LIMIT_S)
    with pytest.raises(UnsupportedError, match="capabilities"):
        await run(session, "true", capabilities=(), user="nobody")
    with pytest.raises(UnsupportedError, match="variable"):
        await run(session, "true", envs=(("a-b", "c"),))


async def test_the_end_of_the_connection_is_the_last_event(server: Server, session: GuestSession):
    running = await session.execute(process("sleep", "100"), container_id=None, timeout_s=LIMIT_S)
    await session.ping(timeout_s=LIMIT_S)
    await server.hang_up()
    assert isinstance([event async for event in session.events()][-1], SessionLost)
    with pytest.raises(AgentError, match="lost"):
        await running.wait()
    with pytest.raises(AgentError, match="lost"):
        await session.ping(timeout_s=LIMIT_S)
    await running.close()


# -- who may talk to whom ----------------------------------------------------------------------------------


async def test_another_host_key_than_the_one_kept_is_refused_at_once(server: Server, short_dir: Path):
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    wrong = " ".join(other.split()[:2])
    agent = SshdAgent(short_dir)
    for refused in (access(server, host_key=wrong), access(server, config_host_key=wrong)):
        with pytest.raises(AgentError, match="must have") as caught:
            await agent.connect(VM, access=refused, timeout_s=LIMIT_S)
        assert caught.value.details["host_key"] == server.host_key
    right = access(server, host_key=wrong, config_host_key=server.host_key)  # what is given wins
    await (await agent.connect(VM, access=right, timeout_s=LIMIT_S)).close()


async def test_a_key_that_the_guest_does_not_know_is_tried_until_the_time_is_over(
    server: Server, short_dir: Path
):
    found = access(server)
    own = AgentAccess(found.config)  # no key given: the node's own, made now, which nobody trusts yet
    agent = SshdAgent(short_dir)
    with pytest.raises(AgentError, match="does not take the key ssh-ed25519 "):
        await agent.connect(VM, access=own, timeout_s=1)
    key_file = short_dir / "sshd_key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    key = asyncssh.import_private_key(key_file.read_bytes())
    key.write_public_key(short_dir / "authorized_keys")  # as an image does whose boot sets it late
    opened = await SshdAgent(short_dir).connect(VM, access=own, timeout_s=LIMIT_S)
    await opened.close()


async def test_a_guest_that_begins_to_listen_late_is_waited_for(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    key = make_key(short_dir / "id")
    async with openssh(short_dir, key) as ended:
        late = access(ended)
    failed = asyncio.Event()
    pause = Attempts.next_pause_s

    def noted(attempts: Attempts) -> float:
        failed.set()
        return pause(attempts)

    monkeypatch.setattr(Attempts, "next_pause_s", noted)
    connecting = asyncio.ensure_future(SshdAgent(short_dir).connect(VM, access=late, timeout_s=LIMIT_S))
    await failed.wait()
    async with openssh(short_dir, key, port=ended.port):
        await (await connecting).close()


async def test_keys_that_are_none(server: Server, short_dir: Path):
    locked = asyncssh.generate_private_key("ssh-ed25519").export_private_key("pkcs8-pem", "x")
    for data in (b"no key", b"", locked):
        bad = AgentAccess(access(server).config, private_key=data)
        with pytest.raises(InvalidArgumentError, match="no private key of SSH without a passphrase"):
            await SshdAgent(short_dir).connect(VM, access=bad, timeout_s=LIMIT_S)


async def test_the_nodes_own_key_must_be_private(short_dir: Path):
    first = keys.own_key(short_dir)
    assert keys.own_key(short_dir).export_public_key() == first.export_public_key()
    (short_dir / "sshd_key").chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        keys.own_key(short_dir)
    (short_dir / "sshd_key").chmod(0o600)
    (short_dir / "sshd_key").write_text("")
    with pytest.raises(StorageError, match="no SSH key"):
        keys.own_key(short_dir)


async def test_a_pod_without_an_address(short_dir: Path):
    with pytest.raises(InvalidArgumentError, match="no address"):
        await SshdAgent(short_dir).connect(VM, access=AgentAccess(), timeout_s=LIMIT_S)
