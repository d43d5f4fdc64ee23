"""What every guest agent with containers promises: the same tests on the mock and on ours in a real VM."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest_vm import guest_vm
from tests.support import leaks
from tests.unit.drivers.agent.guests import FakeVm
from vcnode.aio import Tasks
from vcnode.drivers.agent.mock import MockAgent, MockGuests
from vcnode.drivers.agent.native import NativeAgent
from vcnode.drivers.base import (
    ContainerExited,
    GuestAgent,
    GuestSession,
    LogPosition,
    LogRecord,
    ProcessExit,
    RunningProcess,
)
from vcnode.errors import (
    AgentError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from vcnode.models.pod import ContainerResources
from vcnode.models.vm import (
    ContainerRoot,
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestProcess,
    Watchdog,
)

pytestmark = pytest.mark.timeout(240)  # the first test waits for the boot, without KVM and on a busy host

BOOT_LIMIT_S = 180.0
LIMIT_S = 40.0
_numbers = itertools.count(1)


class Rig:
    """One guest under test; containers of a test have ids of its own, and go with it."""

    def __init__(self, agent: GuestAgent, vm: FakeVm) -> None:
        self._agent = agent
        self._vm = vm
        self._sessions: list[GuestSession] = []
        self._containers: list[str] = []

    async def connect(self) -> GuestSession:
        """Another session; the one before must be closed."""
        session = await self._agent.connect(self._vm.as_vm, timeout_s=BOOT_LIMIT_S)
        self._sessions.append(session)
        return session

    async def create(self, session: GuestSession, *args: str, **process: Any) -> str:
        """A new container of *args*."""
        container_id = self.new_id()
        await session.create_container(container(container_id, *args, **process), timeout_s=LIMIT_S)
        return container_id

    def new_id(self) -> str:
        """An id for a container that goes with the test."""
        self._containers.append(f"c{next(_numbers)}")
        return self._containers[-1]

    async def running(self, session: GuestSession) -> str:
        """A new container that runs until it is told to end."""
        container_id = await self.create(session, "sleep", "infinity")
        await session.start_container(container_id, timeout_s=LIMIT_S)
        return container_id

    async def close(self) -> None:
        """Delete what the test made."""
        for session in self._sessions:
            await session.close()
        session = await self.connect()
        for container_id in self._containers:
            await session.delete_container(container_id, timeout_s=LIMIT_S)
        assert list(await session.list_containers(timeout_s=LIMIT_S)) == []
        await session.close()


@pytest.fixture(scope="module")
def agent_socket(guest_image: Path) -> Iterator[Path]:
    """Port of one VM for all tests of this module."""
    with guest_vm(guest_image) as vm:
        leaks.expected_children.add(vm.process.pid)
        yield vm.agent_socket
    leaks.expected_children.discard(vm.process.pid)


@pytest.fixture(params=["mock", pytest.param("native", marks=pytest.mark.vm)])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    async with Tasks() as tasks:
        if request.param == "mock":
            vm = FakeVm(Path("/nowhere"))
            made = Rig(MockAgent(tasks=tasks, guests=MockGuests()), vm)
        else:
            made = Rig(NativeAgent(), FakeVm(request.getfixturevalue("agent_socket")))
        yield made
        await made.close()


@pytest.fixture
async def session(rig: Rig) -> GuestSession:
    return await rig.connect()


def container(container_id: str, *args: str, **process: Any) -> GuestContainer:
    return GuestContainer(
        container_id=container_id,
        root=ContainerRoot(shared_name="busybox"),
        hostname="box",
        process=GuestProcess(args=args, **process),
    )


async def exit_of(session: GuestSession, container_id: str) -> int:
    """Wait until the container's main process ends."""
    async with asyncio.timeout(LIMIT_S):
        async for event in session.events():
            if isinstance(event, ContainerExited) and event.container_id == container_id:
                return event.exit_code
    raise AssertionError("the session ended first")


async def state_of(session: GuestSession, container_id: str) -> GuestContainerState:
    """What the guest says of the container."""
    states = await session.list_containers(timeout_s=LIMIT_S)
    (found,) = (state for state in states if state.container_id == container_id)
    return found


async def execute(
    session: GuestSession, container_id: str | None, *args: str, **process: Any
) -> RunningProcess:
    return await session.execute(
        GuestProcess(args=args, **process), container_id=container_id, timeout_s=LIMIT_S
    )


async def outcome(process: RunningProcess) -> tuple[int, bytes, bytes]:
    """Exit code and both outputs."""
    found = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(LIMIT_S):
        async for name, data in process.output():
            found[name] += data
        exited = await process.wait()
    return exited.exit_code, found["stdout"], found["stderr"]


async def run(
    session: GuestSession, container_id: str | None, *args: str, **process: Any
) -> tuple[int, bytes, bytes]:
    return await outcome(await execute(session, container_id, *args, **process))


# -- containers ------------------------------------------------------------------------------------


async def test_guest_takes_its_identity(session: GuestSession) -> None:
    config = GuestConfig(
        hostname="pod-1",
        time_ns=time.time_ns(),
        entropy=secrets.token_bytes(64),
        machine_id=secrets.token_hex(16),
    )
    await session.configure(config, timeout_s=LIMIT_S)
    await session.configure(config, timeout_s=LIMIT_S)
    assert await run(session, None, "hostname") == (0, b"pod-1\n", b"")
    await session.set_clock(time.time_ns(), timeout_s=LIMIT_S)
    await session.ping(timeout_s=LIMIT_S)
    assert session.info.agent_version


@pytest.mark.parametrize(
    ("args", "exit_code"),
    [(("true",), 0), (("false",), 1), (("sh", "-c", "exit 7"), 7), (("/no/such/program",), 127)],
    ids=str,
)
async def test_end_of_a_container_is_told(
    rig: Rig, session: GuestSession, args: tuple[str, ...], exit_code: int
) -> None:
    container_id = await rig.create(session, *args)
    assert (await state_of(session, container_id)).state == "created"
    assert await session.start_container(container_id, timeout_s=LIMIT_S) > 0
    assert await exit_of(session, container_id) == exit_code
    state = await state_of(session, container_id)
    assert (state.state, state.exit_code, state.pid, state.oom_killed) == ("stopped", exit_code, None, False)
    assert state.finished_at is not None


async def test_running_container_is_listed_with_its_pid(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.create(session, "sleep", "infinity")
    pid = await session.start_container(container_id, timeout_s=LIMIT_S)
    state = await state_of(session, container_id)
    assert (state.state, state.pid, state.exit_code) == ("running", pid, None)


@pytest.mark.parametrize("everyone", [False, True])
async def test_kill_ends_a_container_and_what_was_executed_in_it(
    rig: Rig, session: GuestSession, everyone: bool
) -> None:
    container_id = await rig.running(session)
    process = await execute(session, container_id, "sleep", "infinity")
    await session.signal_container(container_id, signal.SIGKILL, everyone=everyone, timeout_s=LIMIT_S)
    assert await exit_of(session, container_id) == 137
    assert (await outcome(process))[0] == 137
    await session.signal_container(container_id, signal.SIGKILL, everyone=everyone, timeout_s=LIMIT_S)


async def test_stopped_container_can_be_started_again(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.create(session, "sh", "-c", "exit 4")
    for _ in range(2):
        await session.start_container(container_id, timeout_s=LIMIT_S)
        assert await exit_of(session, container_id) == 4


async def test_deleted_container_is_gone_even_if_it_ran(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    await session.delete_container(container_id, timeout_s=LIMIT_S)
    assert list(await session.list_containers(timeout_s=LIMIT_S)) == []
    await session.delete_container(container_id, timeout_s=LIMIT_S)
    # The id is free again.
    await session.create_container(container(container_id, "true"), timeout_s=LIMIT_S)


async def test_container_of_the_same_id_is_refused_and_the_first_stays(
    rig: Rig, session: GuestSession
) -> None:
    container_id = await rig.running(session)
    with pytest.raises(AlreadyExistsError):
        await session.create_container(container(container_id, "true"), timeout_s=LIMIT_S)
    assert (await state_of(session, container_id)).state == "running"


Call = Callable[[GuestSession], Coroutine[Any, Any, object]]


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.start_container("absent", timeout_s=LIMIT_S),
        lambda s: s.signal_container("absent", 15, everyone=False, timeout_s=LIMIT_S),
        lambda s: execute(s, "absent", "true"),
    ],
    ids=["start", "signal", "execute"],
)
async def test_absent_container_is_not_found(session: GuestSession, call: Call) -> None:
    with pytest.raises(NotFoundError):
        await call(session)


async def test_state_decides_what_is_allowed(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.create(session, "sleep", "infinity")
    with pytest.raises(FailedPreconditionError):
        await execute(session, container_id, "true")
    await session.start_container(container_id, timeout_s=LIMIT_S)
    with pytest.raises(FailedPreconditionError):
        await session.start_container(container_id, timeout_s=LIMIT_S)


async def test_user_that_does_not_exist_is_refused(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    with pytest.raises(InvalidArgumentError):
        await execute(session, container_id, "true", user="nosuchuser")
    with contextlib.suppress(InvalidArgumentError):
        # An agent may look at the user now, or when it starts the container: then that fails.
        other = await rig.create(session, "true", user="nosuchuser")
        await session.start_container(other, timeout_s=LIMIT_S)
        assert await exit_of(session, other) != 0


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("echo", "hello", "you"), (0, b"hello you\n", b"")),
        (("sh", "-c", "echo out; echo err >&2; exit 3"), (3, b"out\n", b"err\n")),
        (("sh", "-c", "false || echo no && exit 5"), (5, b"no\n", b"")),
        (("pwd",), (0, b"/tmp\n", b"")),
        (("hostname",), (0, b"box\n", b"")),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_command_gives_its_output_and_exit_code(
    rig: Rig, session: GuestSession, args: tuple[str, ...], expected: tuple[int, bytes, bytes]
) -> None:
    container_id = await rig.running(session)
    assert await run(session, container_id, *args, workdir="/tmp") == expected


async def test_environment_is_given(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    code, stdout, _ = await run(session, container_id, "env", envs=(("COLOUR", "blue"), ("EMPTY", "")))
    assert code == 0
    assert {b"COLOUR=blue", b"EMPTY=", b"HOSTNAME=box"} <= set(stdout.splitlines())
    assert any(line.startswith(b"PATH=/") for line in stdout.splitlines())


async def test_user_by_number_is_taken(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    code, stdout, _ = await run(session, container_id, "id", user="1234", group="55")
    assert code == 0
    assert stdout.startswith(b"uid=1234 gid=55")


async def test_program_that_is_not_there_ends_with_127_and_a_line(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    code, stdout, stderr = await run(session, container_id, "nosuchprogram")
    assert (code, stdout) == (127, b"")
    assert b"nosuchprogram" in stderr


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
async def test_binary_data_passes_through(rig: Rig, session: GuestSession, size: int) -> None:
    container_id = await rig.running(session)
    data = secrets.token_bytes(size)
    process = await execute(session, container_id, "cat")

    async def write() -> None:
        await process.write_stdin(data)
        await process.close_stdin()

    _, (code, stdout, stderr) = await asyncio.wait_for(asyncio.gather(write(), outcome(process)), LIMIT_S)
    assert (code, stdout == data, stderr) == (0, True, b"")


async def test_signal_ends_a_process(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    process = await execute(session, container_id, "sleep", "infinity")
    await process.signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), LIMIT_S) == ProcessExit(143)
    await process.signal(signal.SIGTERM)
    await process.write_stdin(b"nobody reads this")
    await process.close_stdin()


async def test_close_kills_the_process_and_can_be_repeated(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    process = await execute(session, container_id, "sleep", "infinity")
    await process.close()
    await process.close()
    assert await asyncio.wait_for(process.wait(), LIMIT_S) == ProcessExit(137)


async def test_unread_output_stops_its_process_only(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    stuck = await execute(session, container_id, "cat")
    writing = asyncio.ensure_future(stuck.write_stdin(bytes(32 << 20)))
    assert await run(session, container_id, "echo", "fine") == (0, b"fine\n", b"")
    done, _ = await asyncio.wait({writing}, timeout=0.3)  # as much as shall be waited in vain
    assert not done
    await stuck.close()
    await asyncio.wait_for(writing, LIMIT_S)


async def test_command_in_the_guest_itself(session: GuestSession) -> None:
    assert await run(session, None, "sh", "-c", "echo guest; exit 2") == (2, b"guest\n", b"")


# -- sessions --------------------------------------------------------------------------------------


async def test_containers_outlive_sessions_and_commands_do_not(rig: Rig) -> None:
    first = await rig.connect()
    stays, ends = await rig.running(first), await rig.running(first)
    process = await execute(first, stays, "sleep", "infinity")
    await first.signal_container(ends, signal.SIGKILL, everyone=True, timeout_s=LIMIT_S)
    await first.close()
    with pytest.raises(AgentError):
        await process.wait()

    second = await rig.connect()
    assert (await state_of(second, stays)).state == "running"
    assert await run(second, stays, "echo", "again") == (0, b"again\n", b"")
    await second.signal_container(stays, signal.SIGKILL, everyone=True, timeout_s=LIMIT_S)
    assert await exit_of(second, stays) == 137
    assert (await state_of(second, ends)).exit_code == 137


async def test_closed_session_refuses_calls_and_ends_its_events(session: GuestSession) -> None:
    await session.close()
    await session.close()
    assert [event async for event in session.events()] == []
    with pytest.raises(AgentError):
        await session.ping(timeout_s=LIMIT_S)


# -- pause, processes --------------------------------------------------------------------------------


async def test_a_paused_container_stands_still_until_it_is_resumed(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    for _ in range(2):
        await session.pause_container(container_id, timeout_s=LIMIT_S)
    assert (await state_of(session, container_id)).state == "paused"
    with pytest.raises(FailedPreconditionError):
        await execute(session, container_id, "true")
    await session.close()
    session = await rig.connect()
    assert (await state_of(session, container_id)).state == "paused"
    for _ in range(2):
        await session.resume_container(container_id, timeout_s=LIMIT_S)
    assert (await state_of(session, container_id)).state == "running"
    assert await run(session, container_id, "echo", "on") == (0, b"on\n", b"")


async def test_a_paused_container_can_be_killed_and_started_again(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    for everyone in (False, True):
        await session.pause_container(container_id, timeout_s=LIMIT_S)
        await session.signal_container(container_id, signal.SIGKILL, everyone=everyone, timeout_s=LIMIT_S)
        assert await exit_of(session, container_id) == 137
        await session.start_container(container_id, timeout_s=LIMIT_S)
        assert (await state_of(session, container_id)).state == "running"


async def test_what_does_not_run_cannot_be_paused_but_resumed(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.create(session, "true")
    with pytest.raises(FailedPreconditionError):
        await session.pause_container(container_id, timeout_s=LIMIT_S)
    await session.resume_container(container_id, timeout_s=LIMIT_S)
    for call in (session.pause_container, session.resume_container):
        with pytest.raises(NotFoundError):
            await call("absent", timeout_s=LIMIT_S)


async def test_the_processes_of_a_container_are_told(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    found, total = await session.list_processes(container_id, limit=5, timeout_s=LIMIT_S)
    assert total == len(found) == 1
    (main,) = found
    assert main.args == ("sleep", "infinity")
    assert (main.container_pid, main.uid, main.name) == (1, 0, "sleep")
    assert main.pid == (await state_of(session, container_id)).pid
    assert not main.args_truncated
    with pytest.raises(NotFoundError):
        await session.list_processes("absent", limit=5, timeout_s=LIMIT_S)


async def test_guest_and_containers_tell_what_they_use(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    guest, containers = await session.read_stats(timeout_s=LIMIT_S)
    (found,) = [each for each in containers if each.container_id == container_id]
    assert found.pid_count == 1
    assert found.memory.used_bytes > 0
    assert (found.memory.limit_bytes, found.pid_limit) == (None, None)
    assert guest.cpu.usage_us >= found.cpu.usage_us
    await session.delete_container(container_id, timeout_s=LIMIT_S)
    _, containers = await session.read_stats(timeout_s=LIMIT_S)
    assert container_id not in {each.container_id for each in containers}


async def logged(session: GuestSession, known: dict[str, LogPosition], container_id: str) -> list[LogRecord]:
    """What the feed gives of a container, until the end of a run that has written something."""
    feed = await session.follow_logs(known, timeout_s=LIMIT_S)
    found: list[LogRecord] = []
    async with asyncio.timeout(LIMIT_S):
        async for records in feed.records():
            found += [r for r in records if r.container_id == container_id]
            if found and found[-1].kind == "end" and any(record.data for record in found):
                break
    with pytest.raises(FailedPreconditionError):
        await session.follow_logs(known, timeout_s=LIMIT_S)
    await feed.close()
    return found


async def test_what_containers_write_is_followed_from_where_it_is_kept(rig: Rig) -> None:
    session = await rig.connect()
    first = await rig.create(session, "sh", "-c", "echo one; echo two >&2")
    await session.start_container(first, timeout_s=LIMIT_S)
    found = await logged(session, {}, first)
    assert b"".join(r.data for r in found if r.kind == "stdout") == b"one\n"
    assert b"".join(r.data for r in found if r.kind == "stderr") == b"two\n"
    ends = [0, *(r.offset + len(r.data) for r in found)]
    assert [r.offset for r in found] == ends[:-1]
    assert abs(found[0].time_ns / 1e9 - time.time()) < 3600
    await session.close()

    session = await rig.connect()
    await session.start_container(first, timeout_s=LIMIT_S)
    again = await logged(session, {first: LogPosition(found[0].instance, 8)}, first)
    while again and not again[0].data:
        again.pop(0)  # the end of the first run, which may come again
    assert {(r.instance, r.offset >= 8) for r in again} == {(found[0].instance, True)}
    assert b"".join(sorted(r.data for r in again)) == b"one\ntwo\n"


# -- limits, the end without a host --------------------------------------------------------------------


async def test_limits_change_while_a_container_runs_and_are_told(rig: Rig, session: GuestSession) -> None:
    container_id = await rig.running(session)
    before = (await state_of(session, container_id)).resources
    limits = ContainerResources(cpu_quota_us=50_000, cpu_shares=512, mem_limit_mib=32, pids_limit=8)
    for wanted in (limits, ContainerResources(pids_limit=9), limits):  # what is not given is lifted
        await session.update_container(container_id, wanted, timeout_s=LIMIT_S)
        assert (await state_of(session, container_id)).resources == wanted != before
    assert await run(session, container_id, "echo", "on") == (0, b"on\n", b"")
    with pytest.raises(NotFoundError):
        await session.update_container("absent", limits, timeout_s=LIMIT_S)


async def test_a_limit_below_what_is_in_use_is_refused_and_nothing_changes(
    rig: Rig, session: GuestSession
) -> None:
    container_id = await rig.running(session)
    sleeping = await execute(session, container_id, "sleep", "infinity")
    before = (await state_of(session, container_id)).resources
    with pytest.raises(FailedPreconditionError, match="has 2 processes"):
        await session.update_container(
            container_id, ContainerResources(cpu_shares=512, pids_limit=1), timeout_s=LIMIT_S
        )
    assert (await state_of(session, container_id)).resources == before
    await sleeping.close()


async def test_a_guest_tells_what_it_could_give_away_and_takes_a_watchdog(session: GuestSession) -> None:
    assert 16 << 20 < await session.available_memory(timeout_s=LIMIT_S) < 1 << 40
    await session.set_watchdog(Watchdog(after_s=3600, grace_s=10), timeout_s=LIMIT_S)
    await session.ping(timeout_s=LIMIT_S)
