"""The hyperstart agent over real sockets, with a guest of each version that is written from the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import struct
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.drivers.test_agent_conformance import execute, exit_of, outcome, run, state_of
from tests.support.hyperstart import (
    EXECCMD,
    KILLCONTAINER,
    NEWCONTAINER,
    ONLINECPUMEM,
    PING,
    READFILE,
    REMOVECONTAINER,
    SETUPINTERFACE,
    SETUPROUTE,
    SIGNALPROCESS,
    STARTPOD,
    WINSIZE,
    FakeHyperstart,
    fake_hyperstart,
)
from tests.support.hypervms import SocketVm, connect_to
from vcnode.drivers.agent.hyperstart import HyperstartAgent, processes
from vcnode.drivers.agent.hyperstart.known import FILE
from vcnode.drivers.agent.hyperstart.process import MAX_UNREAD_BYTES, HyperProcess
from vcnode.drivers.agent.hyperstart.session import HyperSession
from vcnode.drivers.base import GuestSession, LogPosition, SessionLost
from vcnode.errors import (
    AgentError,
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    UnsupportedError,
)
from vcnode.models.network import DnsConfig, Endpoint, Route
from vcnode.models.pod import AgentConfig, ContainerResources
from vcnode.models.probes import Probe, Probes
from vcnode.models.vm import (
    ContainerRoot,
    GuestConfig,
    GuestContainer,
    GuestProcess,
    GuestSecret,
    Watchdog,
)

pytestmark = pytest.mark.timeout(30)
LIMIT_S = 10.0
VERSIONS = [4242, 4244, "fork"]
"""4243 is as 4244 to a driver; the suite has it as well."""


@pytest.fixture(params=VERSIONS, ids=str)
def version(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def guest(short_dir: Path, version: Any) -> AsyncIterator[FakeHyperstart]:
    fork = version == "fork"
    async with fake_hyperstart(short_dir, 4244 if fork else version, fork=fork) as made:
        yield made
        assert made.lost_input == 0


async def connect(guest: FakeHyperstart, timeout_s: float = LIMIT_S) -> HyperSession:
    return await connect_to(SocketVm(guest.directory), fork=guest.fork, timeout_s=timeout_s)


@pytest.fixture
async def session(guest: FakeHyperstart) -> AsyncIterator[HyperSession]:
    made = await connect(guest)
    await made.configure(CONFIG, timeout_s=LIMIT_S)
    yield made
    await made.close()
    assert not guest.refusals or guest.refuse, guest.refusals


def endpoint(index: int = 0, *, mtu: int = 1500, addresses: tuple[str, ...] = ("10.1.2.3/24",)) -> Endpoint:
    return Endpoint(
        id=f"e{index}",
        name=f"eth{index}",
        mac="02:00:00:00:00:01",
        addresses=(*addresses, "fd00::3/64"),
        routes=(
            Route(destination="0.0.0.0/0", gateway="10.1.2.1"),
            Route(destination="10.1.2.0/24"),
            Route(destination="::/0", gateway="fd00::1"),
        ),
        mtu=mtu,
    )


CONFIG = GuestConfig(
    hostname="pod-1",
    time_ns=time.time_ns(),
    entropy=bytes(32),
    machine_id="0" * 32,
    endpoints=(endpoint(),),
    dns=DnsConfig(servers=("10.1.2.1",)),
)


def container(container_id: str, *args: str, stdin: bool = False, tty: bool = False, **more: Any) -> Any:
    return GuestContainer(
        container_id=container_id,
        root=ContainerRoot(shared_name=container_id),
        hostname="pod-1",
        process=GuestProcess(args=args, **more),
        stdin=stdin,
        tty=tty,
    )


async def started(session: GuestSession, container_id: str, *args: str, **more: Any) -> str:
    await session.create_container(container(container_id, *args, **more), timeout_s=LIMIT_S)
    assert await session.start_container(container_id, timeout_s=LIMIT_S) == 1
    return container_id


async def sleeping(session: GuestSession, container_id: str = "c1") -> str:
    return await started(session, container_id, "sleep", "1000")


# -- the beginning ---------------------------------------------------------------------------------


async def test_version_and_network_are_negotiated_and_given(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    assert session.info.agent_version == f"hyperstart API {guest.version}"
    assert [code for code, _ in guest.commands] == [0, STARTPOD, ONLINECPUMEM]
    (pod,) = guest.sent(STARTPOD)
    assert pod == {
        "hostname": "pod-1",
        "containers": [],
        "interfaces": [{"device": "eth0", "ipAddress": "10.1.2.3", "netMask": "24"}],
        "dns": ["10.1.2.1"],
        "routes": [
            {"dest": "10.1.2.0/24", "device": "eth0"},
            {"dest": "default", "device": "eth0", "gateway": "10.1.2.1"},
        ],
        "shareDir": "hyperShared",
    }
    await session.ping(timeout_s=LIMIT_S)
    assert guest.sent(PING) == [b""]


async def test_further_interfaces_come_to_a_running_pod(guest: FakeHyperstart, session: HyperSession) -> None:
    again = CONFIG.model_copy(update={"endpoints": (endpoint(), endpoint(1))})
    await session.configure(CONFIG, timeout_s=LIMIT_S)
    await session.configure(again, timeout_s=LIMIT_S)
    assert len(guest.sent(STARTPOD)) == 1
    assert guest.sent(SETUPINTERFACE) == [{"device": "eth1", "ipAddress": "10.1.2.3", "netMask": "24"}]
    assert [route["device"] for route in guest.sent(SETUPROUTE)[0]["routes"]] == ["eth1", "eth1"]


async def test_an_interface_that_this_version_cannot_have_is_refused(guest: FakeHyperstart) -> None:
    session = await connect(guest)
    more = CONFIG.model_copy(
        update={"endpoints": (endpoint(mtu=1400, addresses=("10.1.2.3/24", "10.9.9.9/16")),)}
    )
    if guest.version == 4242:
        with pytest.raises(UnsupportedError, match="4242"):
            await session.configure(more, timeout_s=LIMIT_S)
    else:
        await session.configure(more, timeout_s=LIMIT_S)
        (interface,) = guest.sent(STARTPOD)[0]["interfaces"]
        assert interface["mtu"] == 1400
        assert [a["netMask"] for a in interface["ipAddresses"]] == ["24", "16"]
    await session.close()


async def test_what_the_guest_refuses_is_an_error(guest: FakeHyperstart, session: HyperSession) -> None:
    guest.refuse = {NEWCONTAINER, WINSIZE, READFILE, PING}
    with pytest.raises(AgentError, match="PING"):
        await session.ping(timeout_s=LIMIT_S)
    await session.create_container(container("c1", "true"), timeout_s=LIMIT_S)
    with pytest.raises(AgentError, match="NEWCONTAINER"):
        await session.start_container("c1", timeout_s=LIMIT_S)
    assert (await state_of(session, "c1")).state == "created"
    guest.refuse = {STARTPOD} if session.dialect.cleans_up else set()
    if not guest.refuse:
        await session.start_container("c1", timeout_s=LIMIT_S)
        assert await exit_of(session, "c1") == 0
    guest.refuse = {PING}


async def test_a_silent_guest_costs_no_more_than_its_time(short_dir: Path) -> None:
    async with fake_hyperstart(short_dir) as guest:
        guest.silent = {0}
        with pytest.raises(AgentError, match="did not answer within"):
            await connect(guest, timeout_s=0.05)
        guest.silent = {PING}
    # Its sockets are gone, as when QEMU has ended.
    with pytest.raises(AgentError):
        await connect(guest, timeout_s=0.05)


async def test_a_command_without_an_answer_ends_with_its_time(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    guest.silent = {PING}
    with pytest.raises(AgentError, match="PING within"):
        await session.ping(timeout_s=0.05)


@pytest.mark.parametrize("text", ["", "{}x", '{"containers": {"c": {"stdio": "1"}}}', "\0"])
async def test_what_the_host_remembers_must_make_sense(short_dir: Path, text: str) -> None:
    async with fake_hyperstart(short_dir) as guest:
        (short_dir / FILE).write_text(text)
        with pytest.raises(AgentError, match=FILE):
            await connect(guest)


async def test_a_start_that_cannot_be_remembered_does_not_happen(short_dir: Path) -> None:
    async with fake_hyperstart(short_dir) as guest:
        session = await connect(guest)
        await session.configure(CONFIG, timeout_s=LIMIT_S)
        await session.create_container(container("c1", "true"), timeout_s=LIMIT_S)
        (short_dir / f"{FILE}.new").mkdir()
        with pytest.raises(AgentError, match=FILE):
            await session.start_container("c1", timeout_s=LIMIT_S)
        assert guest.sent(NEWCONTAINER) == []
        (short_dir / f"{FILE}.new").rmdir()
        await session.start_container("c1", timeout_s=LIMIT_S)
        assert await exit_of(session, "c1") == 0
        await session.close()


async def test_an_unknown_version_is_not_spoken_with(short_dir: Path) -> None:
    async with fake_hyperstart(short_dir, 4245) as guest:
        with pytest.raises(AgentError, match="4245"):
            await connect(guest)


# -- containers ------------------------------------------------------------------------------------


async def test_a_container_is_told_as_the_protocol_wants(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    await started(
        session,
        "c1",
        "env",
        envs=(("A", "ü"),),
        workdir="/tmp",
        user="12",
        group="34",
        capabilities=("CAP_KILL",),
    )
    await exit_of(session, "c1")
    (sent,) = guest.sent(NEWCONTAINER)
    process = sent.pop("process")
    assert sent == {
        "id": "c1",
        "image": "c1",
        "rootfs": "",
        "restartPolicy": "never",
        "initialize": False,
    }
    assert process["stdio"] != process["stderr"]
    assert (process["user"], process["group"]) == ("12", "34")
    assert process["envs"] == [{"env": "A", "value": "ü"}]
    assert ("id" in process) == guest.named
    assert ("capabilities" in process) == guest.fork


async def test_signals_are_numbers_and_a_kill_takes_all_along(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    cid = await sleeping(session)
    beside = await execute(session, cid, "sleep", "1000")
    await session.signal_container(cid, 9, everyone=True, timeout_s=LIMIT_S)
    assert await exit_of(session, cid) == 137
    assert (await outcome(beside))[0] == (0 if guest.version == 4242 else 137)
    assert {sent["signal"] for sent in guest.sent(KILLCONTAINER)} == {9}
    await session.signal_container(cid, 9, everyone=True, timeout_s=LIMIT_S)


async def test_a_polite_signal_reaches_the_main_process(session: HyperSession) -> None:
    cid = await started(
        session, "c1", "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done"
    )
    process = await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    await session.signal_container(cid, 15, everyone=False, timeout_s=LIMIT_S)
    async with asyncio.timeout(LIMIT_S):
        assert (await process.wait()).exit_code in (5, 143, 0)


async def test_a_deleted_container_is_killed_first(guest: FakeHyperstart, session: HyperSession) -> None:
    await sleeping(session, "other")
    cid = await sleeping(session)
    await session.delete_container(cid, timeout_s=LIMIT_S)
    assert guest.sent(REMOVECONTAINER) == [{"container": cid}]
    await sleeping(session)  # the id is free again


async def test_the_next_container_gets_a_pod_again(guest: FakeHyperstart, session: HyperSession) -> None:
    await started(session, "c1", "true")
    await exit_of(session, "c1")
    cid = await sleeping(session, "c2")
    assert (await state_of(session, cid)).state == "running"
    assert len(guest.sent(STARTPOD)) == (2 if session.dialect.cleans_up else 1)


Call = Callable[[GuestSession], Coroutine[Any, Any, object]]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s: s.start_container("absent", timeout_s=1), NotFoundError),
        (lambda s: s.signal_container("absent", 15, everyone=False, timeout_s=1), NotFoundError),
        (lambda s: execute(s, "absent", "true"), NotFoundError),
        (lambda s: s.attach("absent", tty=False, timeout_s=1), NotFoundError),
        (lambda s: s.copy("out", container_id="absent", path="/", max_bytes=1, timeout_s=1), NotFoundError),
        (lambda s: s.create_container(container("c1", "x"), timeout_s=1), AlreadyExistsError),
        (lambda s: s.start_container("c1", timeout_s=1), FailedPreconditionError),
        (lambda s: s.pause_container("c1", timeout_s=1), UnsupportedError),
        (lambda s: s.resume_container("c1", timeout_s=1), UnsupportedError),
        (lambda s: s.update_container("c1", ContainerResources(), timeout_s=1), UnsupportedError),
        (lambda s: s.list_processes("c1", limit=1, timeout_s=1), UnsupportedError),
        (lambda s: s.read_stats(timeout_s=1), UnsupportedError),
        (lambda s: s.available_memory(timeout_s=1), UnsupportedError),
        (lambda s: s.connect_port(80, timeout_s=1), UnsupportedError),
        (lambda s: s.set_watchdog(Watchdog(after_s=1, grace_s=1), timeout_s=1), UnsupportedError),
    ],
)
async def test_what_cannot_be_is_refused_by_its_kind(short_dir: Path, call: Call, error: Any) -> None:
    async with fake_hyperstart(short_dir) as guest:
        session = await connect(guest)
        await session.configure(CONFIG, timeout_s=LIMIT_S)
        await sleeping(session)
        with pytest.raises(error):
            await call(session)
        await session.set_clock(1, timeout_s=LIMIT_S)
        await session.close()
        with pytest.raises(AgentError):
            await session.ping(timeout_s=LIMIT_S)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"root": ContainerRoot(disk_id="d")}, "image"),
        ({"readonly": True}, "readonly_rootfs"),
        ({"secrets": (GuestSecret(name="a", mode=0o400, data=b""),)}, "secrets"),
        ({"resources": ContainerResources(pids_limit=5)}, "resources"),
        ({"probes": Probes(liveness=Probe.model_validate({"tcp": {"port": 1}}))}, "probes"),
        ({"process": GuestProcess(args=("x",), rlimits=(("core", 0, 0),))}, "resource limits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_no_command_can_say_is_refused(short_dir: Path, change: Any, field: str) -> None:
    async with fake_hyperstart(short_dir) as guest:
        session = await connect(guest)
        with pytest.raises(UnsupportedError, match=field):
            await session.create_container(container("c1", "x").model_copy(update=change), timeout_s=1)
        await session.close()


# -- processes -------------------------------------------------------------------------------------


async def test_a_program_that_is_not_there(guest: FakeHyperstart, session: HyperSession) -> None:
    cid = await sleeping(session)
    if guest.named:
        with pytest.raises(AgentError, match="EXECCMD"):
            await execute(session, cid, "nosuchprogram")
        guest.refuse = {EXECCMD}
    else:
        assert (await run(session, cid, "nosuchprogram"))[0] == 127


async def test_a_command_in_the_guest_itself(guest: FakeHyperstart, session: HyperSession) -> None:
    await sleeping(session)
    if session.dialect.guest_exec:
        assert await run(session, None, "echo", "guest") == (0, b"guest\n", b"")
        assert guest.sent(EXECCMD)[0]["container"] == "hyperstart"
    else:
        with pytest.raises(UnsupportedError, match="outside of containers"):
            await execute(session, None, "true")


async def test_who_does_not_read_is_waited_for_until_he_lets_go(session: HyperSession) -> None:
    cid = await sleeping(session)
    stuck = await execute(session, cid, "sh", "-c", "head -c 8000000 /dev/zero; sleep 1000")
    other = await execute(session, cid, "echo", "fine")
    waiting = asyncio.ensure_future(outcome(other))
    await session.ping(timeout_s=LIMIT_S)  # commands go on in any case
    await stuck.close()
    assert await waiting == (0, b"fine\n", b"")


async def test_what_is_killed_cannot_fill_the_memory(guest: FakeHyperstart, session: HyperSession) -> None:
    """A hostile guest goes on with its output, whatever it is told."""
    cid = await sleeping(session)
    process = await execute(session, cid, "sleep", "1000")
    assert isinstance(process, HyperProcess)
    guest.refuse = {SIGNALPROCESS}
    running = process.running
    running.killed = True
    for _ in range(200):
        guest.put(running.stdio, bytes(50_000))
        await asyncio.sleep(0)
    await session.ping(timeout_s=LIMIT_S)
    reader = running.readers[0]
    async with asyncio.timeout(LIMIT_S):
        while not reader.is_behind:
            await reader.changed.wait()
    assert reader.size <= MAX_UNREAD_BYTES + 50_000
    guest.refuse = {0}


async def test_a_terminal_has_a_size_and_no_other_output(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    cid = await sleeping(session)
    script = "echo err >&2; read x; stty size; echo got $x; exit 4"
    process = await session.execute(
        GuestProcess(args=("sh", "-c", script)), container_id=cid, tty=(33, 101), timeout_s=LIMIT_S
    )
    await process.resize(40, 120)
    await process.write_stdin(b"x\n")
    await process.close_stdin()  # a terminal has no end of input
    code, out, err = await outcome(process)
    assert (code, err) == (4, b"")
    assert b"err\r\n" in out
    assert b"40 120\r\ngot x\r\n" in out
    assert guest.sent(EXECCMD)[0]["process"]["stderr"] == 0
    assert len(guest.sent(WINSIZE)) == 2


async def test_signals_to_a_process(guest: FakeHyperstart, session: HyperSession) -> None:
    cid = await sleeping(session)
    process = await execute(session, cid, "sleep", "1000")
    if guest.named:
        await process.signal(signal.SIGTERM)
        assert (await outcome(process))[0] == 143
        assert guest.sent(SIGNALPROCESS)[0]["signal"] == 15
        await process.signal(signal.SIGTERM)
    else:
        with pytest.raises(UnsupportedError):
            await process.signal(signal.SIGTERM)


async def test_close_kills_what_can_be_killed(guest: FakeHyperstart, session: HyperSession) -> None:
    cid = await sleeping(session)
    process = await execute(session, cid, "cat")
    await process.close()
    await process.close()
    async with asyncio.timeout(LIMIT_S):
        # Without a name for it, the end of its input is all that it can be sent.
        assert (await process.wait()).exit_code == (137 if guest.version in (4242,) or guest.named else 0)


async def test_a_start_that_nobody_waits_for_is_taken_back(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    cid = await sleeping(session)
    starting = asyncio.ensure_future(execute(session, cid, "cat"))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    async with asyncio.timeout(LIMIT_S):
        while any(p.container == cid and p.popen.args == ["cat"] for p in guest.processes if p.popen):
            await guest.changed.wait()
            guest.changed.clear()
    await session.ping(timeout_s=LIMIT_S)


# -- main processes --------------------------------------------------------------------------------


async def test_who_is_attached_talks_with_the_main_process(session: HyperSession) -> None:
    cid = await started(session, "c1", "sh", "-c", "while read l; do echo got $l; done; exit 4", stdin=True)
    first = await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    second = await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    await second.write_stdin(b"one\n")
    assert await anext(aiter(second.output())) == ("stdout", b"got one\n")
    await second.close()
    assert (await second.wait()).exit_code == 0
    await first.write_stdin(b"two\n")
    await first.close_stdin()
    assert await outcome(first) == (4, b"got one\ngot two\n", b"")


async def test_without_stdin_the_main_process_has_none(session: HyperSession) -> None:
    await started(session, "c1", "cat")
    assert await exit_of(session, "c1") == 0


# -- files -----------------------------------------------------------------------------------------


def archive(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as made:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            entry.size, entry.type = len(content), kind
            made.addfile(entry, io.BytesIO(content))
    return raw.getvalue()


async def copy_in(session: GuestSession, cid: str, path: str, data: bytes, limit: int = 1 << 20) -> Any:
    process = await session.copy("in", container_id=cid, path=path, max_bytes=limit, timeout_s=LIMIT_S)
    await process.write_stdin(data)
    await process.close_stdin()
    code, _, err = await outcome(process)
    return None if code == 0 else json.loads(err)[0]


async def copy_out(session: GuestSession, cid: str, path: str, limit: int = 1 << 20) -> Any:
    process = await session.copy("out", container_id=cid, path=path, max_bytes=limit, timeout_s=LIMIT_S)
    code, out, err = await outcome(process)
    if code:
        return json.loads(err)[0]
    with tarfile.open(fileobj=io.BytesIO(out)) as got:
        (entry,) = got
        content = got.extractfile(entry)
        assert content is not None
        return entry.name, content.read()


async def test_files_go_in_and_come_out(guest: FakeHyperstart, session: HyperSession) -> None:
    cid = await sleeping(session)
    files = guest.directory / "files" / cid
    (files / "etc").mkdir(parents=True)
    content = os.urandom(30_000) + b"}{"
    assert await copy_in(session, cid, "/etc", archive(("a", content), ("b", b""))) is None
    assert (files / "etc" / "a").read_bytes() == content
    assert await copy_out(session, cid, "/etc/../etc/a") == ("a", content)
    assert await copy_out(session, cid, "/etc/b") == ("b", b"")
    assert await copy_in(session, cid, "/etc/new", archive(("old", b"x"))) is None
    assert (files / "etc" / "new").read_bytes() == b"x"
    assert await copy_in(session, cid, "/nowhere/x", archive(("a", b"x"))) == "not_found"
    assert await copy_out(session, cid, "/nowhere") == "not_found"
    assert guest.largest_chunk <= 512
    guest.refuse = {0}  # some were refused, as they had to be


async def test_copies_that_the_protocol_cannot_carry(session: HyperSession) -> None:
    cid = await sleeping(session)
    assert await copy_in(session, cid, "/", archive(("../x", b""))) == "invalid_argument"
    assert await copy_in(session, cid, "/", archive(("/x", b""))) == "invalid_argument"
    assert await copy_in(session, cid, "/", b"no archive" * 100) == "invalid_argument"
    assert await copy_in(session, cid, "/", archive(("d", b""), kind=tarfile.DIRTYPE)) == "not_implemented"
    assert await copy_in(session, cid, "/", archive(("big", bytes(2000))), 1000) == "not_implemented"
    assert await copy_out(session, cid, "/a}b") == "not_implemented"
    process = await session.copy("in", container_id=cid, path="/", max_bytes=1, timeout_s=LIMIT_S)
    await process.close()
    assert (await process.wait()).exit_code == 137


# -- sessions --------------------------------------------------------------------------------------


async def test_another_session_knows_what_runs(guest: FakeHyperstart, session: HyperSession) -> None:
    cid = await started(session, "c1", "sh", "-c", "read x; exit 3", stdin=True)
    await started(session, "ended", "sh", "-c", "exit 6")
    assert await exit_of(session, "ended") == 6
    beside = await execute(session, cid, "sleep", "1000")
    await session.close()
    with contextlib.suppress(AgentError):  # unless its end was heard before that of the session
        assert (await beside.wait()).exit_code == 137
    async with asyncio.timeout(LIMIT_S):
        while guest.named and any(p.id != "init" for p in guest.processes):
            await guest.changed.wait()
            guest.changed.clear()
    again = await connect(guest)
    states = {s.container_id: (s.state, s.exit_code) for s in await again.list_containers(timeout_s=LIMIT_S)}
    assert states == {"c1": ("running", None), "ended": ("stopped", 6)}
    feed = await again.follow_logs({}, timeout_s=LIMIT_S)
    main = await again.attach(cid, tty=False, timeout_s=LIMIT_S)
    await main.write_stdin(b"x\n")
    assert await exit_of(again, cid) == 3
    with pytest.raises(NotFoundError):
        await again.start_container(cid, timeout_s=LIMIT_S)
    await again.delete_container(cid, timeout_s=LIMIT_S)
    await started(again, cid, "true")
    assert await exit_of(again, cid) == 0
    await feed.close()
    await again.close()


async def test_a_session_finds_its_place_in_half_frames(guest: FakeHyperstart, session: HyperSession) -> None:
    """What the guest had begun to send to an earlier session comes to the next one, from its middle."""
    cid = await sleeping(session)
    known = json.loads((guest.directory / FILE).read_text())["containers"][cid]
    await session.close()

    late = struct.pack(">QI", known["stdio"], 16) + b"late"
    guest.begun = {
        "ctl": b'half of an event"}' + struct.pack(">III", 14, 12, 77) + struct.pack(">II", 9, 8),
        "tty": os.urandom(300) + late,
    }
    again = await connect(guest)
    records = (
        await again.follow_logs({cid: LogPosition(known["instance"], 40)}, timeout_s=LIMIT_S)
    ).records()
    async with asyncio.timeout(LIMIT_S):
        (record,) = await anext(records)
    assert (record.instance, record.offset, record.data) == (known["instance"], 40, b"late")
    await again.ping(timeout_s=LIMIT_S)
    await again.close()


@pytest.mark.parametrize("version", [4244])
async def test_an_end_that_is_told_without_that_of_its_output_is_believed_after_a_while(
    guest: FakeHyperstart, session: HyperSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LINGER_S", 0.05)
    cid = await sleeping(session)
    process = await execute(session, cid, "sh", "-c", "echo out; sleep 1000")
    output = process.output()
    assert await anext(output) == ("stdout", b"out\n")
    (running,) = (p for p in guest.processes if guest.containers[cid] is not p)
    told = {"container": cid, "process": "nobody", "event": "finished", "status": 7}
    for event in (told, {**told, "process": running.id}):
        guest.tell(23, json.dumps(event).encode())
    async with asyncio.timeout(LIMIT_S):
        assert [chunk async for chunk in output] == []
        assert (await process.wait()).exit_code == 7


async def test_a_container_that_the_guest_has_lost_is_told_as_ended(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    await sleeping(session)
    process = guest.containers.pop("c1")
    await session.close()
    again = await connect(guest)
    (state,) = await again.list_containers(timeout_s=LIMIT_S)
    assert (state.state, state.exit_code) == ("stopped", 0)
    guest.containers["c1"] = process
    guest.refuse = {0}
    await again.close()


@pytest.mark.parametrize(
    ("channel", "data"),
    [
        ("ctl", struct.pack(">II", 99, 8)),
        ("ctl", struct.pack(">II", 9, 8)),
        ("ctl", struct.pack(">II", 9, 7)),
        ("ctl", struct.pack(">II", 23, 1 << 31)),
        ("ctl", struct.pack(">II", 8, 8)),
        ("ctl", struct.pack(">III", 14, 12, 5)),
        ("ctl", struct.pack(">II", 23, 10) + b"{}"),
        ("ctl", struct.pack(">II", 13, 9) + b"x"),
        ("tty", struct.pack(">QI", 1, 11)),
        ("tty", struct.pack(">QI", 1, 1 << 31)),
    ],
)
async def test_a_guest_that_breaks_the_protocol_loses_its_session(
    short_dir: Path, channel: str, data: bytes
) -> None:
    async with fake_hyperstart(short_dir) as guest:
        session = await connect(guest)
        await session.configure(CONFIG, timeout_s=LIMIT_S)
        cid = await sleeping(session)
        process = await execute(session, cid, "sleep", "1000")
        (guest.tell_raw if channel == "ctl" else guest.put_raw)(data)
        async with asyncio.timeout(LIMIT_S):
            events = [event async for event in session.events()]
            assert isinstance(events[-1], SessionLost)
            assert "broke the protocol" in events[-1].reason
            with pytest.raises(AgentError):
                await process.wait()
            with pytest.raises(AgentError):
                await session.ping(timeout_s=LIMIT_S)
        await session.close()


async def test_the_end_of_the_vm_ends_the_session(guest: FakeHyperstart, session: HyperSession) -> None:
    cid = await sleeping(session)
    process = await execute(session, cid, "sleep", "1000")
    waiting = [asyncio.ensure_future(process.wait()), asyncio.ensure_future(outcome(process))]
    await guest.stop()
    async with asyncio.timeout(LIMIT_S):
        for each in waiting:
            with pytest.raises(AgentError):
                await each
    guest.refuse = {0}


async def test_a_next_that_is_lost_holds_nothing_up_for_good(
    guest: FakeHyperstart, session: HyperSession
) -> None:
    """Its port may have no room for it; the answer says as much."""
    guest.keeps_next = True
    for _ in range(3):
        await session.ping(timeout_s=LIMIT_S)


async def test_shutdown_is_answered_and_powers_off(guest: FakeHyperstart, session: HyperSession) -> None:
    await started(session, "c1", "true")
    await exit_of(session, "c1")
    await session.shutdown(timeout_s=LIMIT_S)
    async with asyncio.timeout(LIMIT_S):
        await guest.off.wait()
    guest.refuse = {0}


async def test_shutdown_waits_for_containers(guest: FakeHyperstart, session: HyperSession) -> None:
    await sleeping(session)
    await session.shutdown(timeout_s=LIMIT_S)
    async with asyncio.timeout(LIMIT_S):
        await guest.off.wait()


def test_its_ports_are_those_of_its_config() -> None:
    agent = HyperstartAgent()
    names = [channel.name for channel in agent.channels(AgentConfig())]
    assert names == ["sh.hyper.channel.0", "sh.hyper.channel.1"]
    assert agent.share_tag == "hyperShared"
    assert set(agent.info.capabilities) == {"attach", "containers", "copy", "exec", "tty"}
