"""What a pod needs of hyperstart, whoever plays it: guests written from its description, and a real one.

``VCNODE_TEST_HYPERSTART=DIR`` names a directory with ``kernel`` and ``initrd`` of a real guest;
``VCNODE_TEST_HYPERSTART_DIALECT=clearcontainers`` says that it is the fork's, and
``VCNODE_TEST_HYPERSTART_MACHINE=microvm`` that its kernel is for another machine than q35.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.drivers.test_agent_conformance import execute, exit_of, outcome, run, state_of
from tests.integration.guest_here import make_busybox
from tests.support.guests import make_spec
from tests.support.hyperstart import fake_hyperstart
from tests.support.hypervms import SocketVm, connect_to
from vcnode.aio import Tasks
from vcnode.drivers.agent.hyperstart import HyperstartAgent
from vcnode.drivers.base import GuestSession, LogRecord
from vcnode.drivers.hypervisor.qemu import Guest, QemuHypervisor
from vcnode.errors import UnsupportedError
from vcnode.models.hypervisor import MachineType
from vcnode.models.pod import AgentConfig
from vcnode.models.vm import ContainerRoot, GuestConfig, GuestContainer, GuestProcess, VmConfig
from vcnode.settings import QemuSettings

REAL = "VCNODE_TEST_HYPERSTART"
BOOT_LIMIT_S = 120.0
LIMIT_S = 20.0
pytestmark = pytest.mark.timeout(180)
_numbers = itertools.count(1)


@pytest.fixture(params=["4242", "4243", "4244", "fork", pytest.param("real", marks=pytest.mark.vm)])
async def session(request: pytest.FixtureRequest, short_dir: Path) -> AsyncIterator[GuestSession]:
    if request.param == "real":
        async for made in real_session(short_dir, request):
            yield made
        return
    fork = request.param == "fork"
    async with fake_hyperstart(short_dir, 4244 if fork else int(request.param), fork=fork) as guest:
        session = await connect_to(SocketVm(guest.directory), fork=fork, timeout_s=LIMIT_S)
        await configure(session)
        yield session
        await session.close()
        assert guest.lost_input == 0


async def real_session(directory: Path, request: pytest.FixtureRequest) -> AsyncIterator[GuestSession]:
    """A session with a real guest in a VM of its own."""
    if not (named := os.environ.get(REAL)):
        pytest.skip(f"{REAL} names no directory with the kernel and initrd of a real hyperstart")
    guest_image: Path = request.getfixturevalue("guest_image")
    spec = make_spec(directory)
    make_busybox(Path(spec.shared_dir, "busybox"))
    agent = HyperstartAgent()
    update = {
        "config": VmConfig(
            machine_type=MachineType(os.environ.get(f"{REAL}_MACHINE", "q35")),
            kernel=str(Path(named, "kernel")),
            initrd=str(Path(named, "initrd")),
        ),
        "channels": agent.channels(AgentConfig()),
        "share_tag": agent.share_tag,
        "mem_size_mib": 256,
    }
    async with Tasks() as tasks:
        own = Guest(guest_image / "vmlinux", guest_image / "initrd")
        node = QemuHypervisor(QemuSettings(), own, state_dir=directory, tasks=tasks)
        await node.open()
        vm = await node.launch(spec.model_copy(update=update), timeout_s=BOOT_LIMIT_S)
        try:
            fork = os.environ.get(f"{REAL}_DIALECT") == "clearcontainers"
            session = await connect_to(vm, fork=fork, timeout_s=BOOT_LIMIT_S)
            await configure(session)
            yield session
            await session.close()
        finally:
            await vm.stop(grace_s=0)
            await vm.close()
            await node.close()


async def configure(session: GuestSession) -> None:
    config = GuestConfig(
        hostname="pod-1", time_ns=time.time_ns(), entropy=secrets.token_bytes(64), machine_id="0" * 32
    )
    await session.configure(config, timeout_s=LIMIT_S)


async def made(session: GuestSession, *args: str, stdin: bool = False, tty: bool = False) -> str:
    """A running container."""
    container_id = f"c{next(_numbers)}"
    spec = GuestContainer(
        container_id=container_id,
        root=ContainerRoot(shared_name="busybox"),
        hostname="pod-1",
        process=GuestProcess(args=args),
        stdin=stdin,
        tty=tty,
    )
    await session.create_container(spec, timeout_s=LIMIT_S)
    await session.start_container(container_id, timeout_s=LIMIT_S)
    return container_id


async def test_containers_end_with_their_codes_and_can_be_made_again(session: GuestSession) -> None:
    cid = await made(session, "sh", "-c", "exit 7")
    assert await exit_of(session, cid) == 7
    state = await state_of(session, cid)
    assert (state.state, state.exit_code) == ("stopped", 7)
    await session.start_container(cid, timeout_s=LIMIT_S)
    assert await exit_of(session, cid) == 7
    await session.delete_container(cid, timeout_s=LIMIT_S)
    await session.delete_container(cid, timeout_s=LIMIT_S)
    assert list(await session.list_containers(timeout_s=LIMIT_S)) == []


async def test_commands_give_output_and_exit_codes(session: GuestSession) -> None:
    cid = await made(session, "sleep", "1000")
    assert await run(session, cid, "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    code, out, _ = await run(session, cid, "sh", "-c", "pwd; echo $A", workdir="/tmp", envs=(("A", "ü"),))
    assert (code, out) == (0, "/tmp\nü\n".encode())
    code, out, _ = await run(session, cid, "head", "-c", "1000000", "/dev/zero")
    assert (code, len(out)) == (0, 1_000_000)


@pytest.mark.parametrize("size", [0, 501, 20_000])
async def test_input_is_not_lost(session: GuestSession, size: int) -> None:
    cid = await made(session, "sleep", "1000")
    data = secrets.token_bytes(size)
    process = await execute(session, cid, "cat")

    async def write() -> None:
        await process.write_stdin(data)
        await process.close_stdin()

    _, (code, out, err) = await asyncio.wait_for(asyncio.gather(write(), outcome(process)), 2 * LIMIT_S)
    assert (code, out == data, err) == (0, True, b"")


async def test_a_terminal(session: GuestSession) -> None:
    cid = await made(session, "sleep", "1000")
    script = "read x; stty size; echo got $x; exit 4"
    process = await session.execute(
        GuestProcess(args=("sh", "-c", script)), container_id=cid, tty=(33, 101), timeout_s=LIMIT_S
    )
    try:
        await process.resize(40, 120)
        await process.write_stdin(b"x\n")
        code, out, err = await outcome(process)
    finally:
        await process.close()
    assert (code, err) == (4, b"")
    assert b"40 120\r\ngot x\r\n" in out


async def test_who_is_attached_talks_with_the_main_process(session: GuestSession) -> None:
    cid = await made(session, "sh", "-c", "while read l; do echo got $l; done; exit 4", stdin=True)
    process = await session.attach(cid, tty=False, timeout_s=LIMIT_S)
    await process.write_stdin(b"one\n")
    await process.write_stdin(b"two\n")
    await process.close_stdin()
    assert await outcome(process) == (4, b"got one\ngot two\n", b"")


async def test_what_is_written_is_kept_for_the_log(session: GuestSession) -> None:
    feed = await session.follow_logs({}, timeout_s=LIMIT_S)
    await made(session, "sh", "-c", "echo out; sleep 0.1; echo err >&2")
    records: list[LogRecord] = []
    async with asyncio.timeout(LIMIT_S):
        async for batch in feed.records():
            records += batch
            if records[-1].kind == "end":
                break
    assert [(r.kind, r.offset, r.data) for r in records] == [
        ("stdout", 0, b"out\n"),
        ("stderr", 4, b"err\n"),
        ("end", 8, b""),
    ]
    await feed.close()


async def test_a_kill_ends_a_container_and_all_in_it(session: GuestSession) -> None:
    cid = await made(session, "sleep", "1000")
    beside = await execute(session, cid, "sleep", "1000")
    await session.signal_container(cid, 9, everyone=True, timeout_s=LIMIT_S)
    assert await exit_of(session, cid) == 137
    await asyncio.wait_for(outcome(beside), LIMIT_S)


async def test_the_guest_goes_when_it_is_asked_to(session: GuestSession) -> None:
    await session.ping(timeout_s=LIMIT_S)
    cid = await made(session, "true")
    await exit_of(session, cid)
    with pytest.raises(UnsupportedError):
        await session.connect_port(1, timeout_s=LIMIT_S)
    await session.shutdown(timeout_s=LIMIT_S)
