"""What the mock agent does beyond the promises of every agent: faults, VMs that die, restarts, full pipes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.drivers.agent.guests import LIMIT_S, FakeVm
from vcnode.aio import Tasks
from vcnode.drivers.agent import events as events_module
from vcnode.drivers.agent.mock import MockAgent, MockGuests
from vcnode.drivers.agent.mock.process import BUFFER_BYTES
from vcnode.drivers.base import ContainerExited, GuestSession, ProcessExit, RunningProcess, SessionLost
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.hypervisor.mock import MockHypervisor
from vcnode.errors import AgentError, DeadlineExceededError, InvalidArgumentError
from vcnode.models.vm import ContainerRoot, GuestContainer, GuestProcess, VmSpec

VM = VmSpec(
    vm_id="vm-1", uuid="u", vcpu_count=1, mem_size_mib=128, directory="/nowhere", shared_dir="/nowhere/shared"
)


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    async with Tasks() as tasks:
        yield tasks


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm(Path("/nowhere"))


def sleeper(container_id: str, *args: str) -> GuestContainer:
    return GuestContainer(
        container_id=container_id,
        root=ContainerRoot(shared_name="x"),
        hostname="box",
        process=GuestProcess(args=args or ("sleep", "infinity")),
    )


async def start(session: GuestSession, container_id: str, *args: str) -> None:
    await session.create_container(sleeper(container_id, *args), timeout_s=LIMIT_S)
    await session.start_container(container_id, timeout_s=LIMIT_S)


async def execute(session: GuestSession, *args: str) -> RunningProcess:
    return await session.execute(GuestProcess(args=args), container_id=None, timeout_s=LIMIT_S)


async def test_it_is_marked_as_a_mock(tasks: Tasks) -> None:
    info = MockAgent(tasks=tasks).info
    assert info.mock
    assert "containers" in info.capabilities


async def test_end_of_the_vm_ends_session_processes_and_guest(tasks: Tasks, vm: FakeVm) -> None:
    agent = MockAgent(tasks=tasks)
    session = await agent.connect(vm.as_vm, timeout_s=LIMIT_S)
    await start(session, "c")
    process = await execute(session, "sleep", "infinity")
    waiting = asyncio.ensure_future(process.wait())
    vm.ended.set()

    async with asyncio.timeout(LIMIT_S):
        assert [event async for event in session.events()] == [SessionLost("The VM has ended.")]
    with pytest.raises(AgentError):
        await waiting
    with pytest.raises(AgentError):
        await anext(process.output())
    with pytest.raises(AgentError):
        await session.ping(timeout_s=LIMIT_S)
    with pytest.raises(AgentError):
        await agent.connect(vm.as_vm, timeout_s=LIMIT_S)
    assert await tasks.join(timeout_s=LIMIT_S)


async def test_restarted_node_finds_the_guest_as_it_was(tasks: Tasks, vm: FakeVm) -> None:
    guests = MockGuests()
    before = await MockAgent(tasks=tasks, guests=guests).connect(vm.as_vm, timeout_s=LIMIT_S)
    await start(before, "c")
    await before.close()
    after = await MockAgent(tasks=tasks, guests=guests).connect(vm.as_vm, timeout_s=LIMIT_S)
    (state,) = await after.list_containers(timeout_s=LIMIT_S)
    assert (state.container_id, state.state) == ("c", "running")


async def test_new_session_takes_the_place_of_the_old(tasks: Tasks, vm: FakeVm) -> None:
    agent = MockAgent(tasks=tasks)
    old = await agent.connect(vm.as_vm, timeout_s=LIMIT_S)
    new = await agent.connect(vm.as_vm, timeout_s=LIMIT_S)
    await start(new, "c", "true")

    assert [type(event) async for event in old.events()] == [SessionLost]
    assert await anext(new.events()) == ContainerExited("c", 0, oom_killed=False)
    await new.close()
    assert await tasks.join(timeout_s=LIMIT_S)


@pytest.mark.parametrize(
    ("plan", "error"), [("agent.ping:1=fail", AgentError), ("agent.ping:1=hang", DeadlineExceededError)]
)
async def test_fault_hits_the_planned_call_only(
    tasks: Tasks, vm: FakeVm, plan: str, error: type[Exception]
) -> None:
    session = await MockAgent(FaultPlan.parse(plan), tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    with pytest.raises(error):
        await session.ping(timeout_s=0.05)
    await session.ping(timeout_s=LIMIT_S)


@pytest.mark.parametrize("action", ["fail", "hang"])
async def test_connect_that_fails_leaves_nothing(tasks: Tasks, vm: FakeVm, action: str) -> None:
    agent = MockAgent(FaultPlan.parse(f"agent.connect:1={action}"), tasks=tasks)
    with pytest.raises(AgentError):
        await agent.connect(vm.as_vm, timeout_s=0.05)
    assert tasks.count == 0
    session = await agent.connect(vm.as_vm, timeout_s=LIMIT_S)
    await session.ping(timeout_s=LIMIT_S)


async def test_failed_call_does_nothing(tasks: Tasks, vm: FakeVm) -> None:
    plan = FaultPlan.parse("agent.create_container:*=fail")
    session = await MockAgent(plan, tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    with pytest.raises(AgentError):
        await session.create_container(sleeper("c"), timeout_s=LIMIT_S)
    assert list(await session.list_containers(timeout_s=LIMIT_S)) == []


async def test_vm_that_the_plan_lets_die_in_a_call_loses_the_session(tasks: Tasks) -> None:
    plan = FaultPlan.parse("agent.create_container:1=die")
    hypervisor = MockHypervisor(plan)
    session = await MockAgent(plan, tasks=tasks).connect(
        await hypervisor.launch(VM, timeout_s=LIMIT_S), timeout_s=LIMIT_S
    )
    with pytest.raises(AgentError):
        await session.create_container(sleeper("c"), timeout_s=LIMIT_S)
    assert [type(event) async for event in session.events()] == [SessionLost]


async def test_main_process_ends_when_it_has_slept(tasks: Tasks, vm: FakeVm) -> None:
    session = await MockAgent(tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    await start(session, "c", "sh", "-c", "sleep 0.01; exit 9")
    async with asyncio.timeout(LIMIT_S):
        assert await anext(session.events()) == ContainerExited("c", 9, oom_killed=False)


@pytest.mark.parametrize(
    ("number", "state"), [(15, "stopped"), (2, "stopped"), (17, "running"), (28, "running")]
)
async def test_signals_that_processes_ignore_are_ignored(
    tasks: Tasks, vm: FakeVm, number: int, state: str
) -> None:
    session = await MockAgent(tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    await start(session, "c")
    await session.signal_container("c", number, everyone=False, timeout_s=LIMIT_S)
    (found,) = await session.list_containers(timeout_s=LIMIT_S)
    assert found.state == state
    assert found.exit_code == (128 + number if state == "stopped" else None)


async def test_signal_that_does_not_exist_is_refused(tasks: Tasks, vm: FakeVm) -> None:
    session = await MockAgent(tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    await start(session, "c")
    with pytest.raises(InvalidArgumentError):
        await session.signal_container("c", 0, everyone=False, timeout_s=LIMIT_S)
    process = await execute(session, "sleep", "infinity")
    with pytest.raises(InvalidArgumentError):
        await process.signal(65)


async def test_events_that_nobody_reads_cost_the_session(
    tasks: Tasks, vm: FakeVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "MAX_EVENTS", 2)
    session = await MockAgent(tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    for number in range(3):
        await start(session, f"c{number}")
        await session.signal_container(f"c{number}", 9, everyone=False, timeout_s=LIMIT_S)
    assert [type(e) async for e in session.events()] == [ContainerExited, ContainerExited, SessionLost]


async def test_cat_holds_one_buffer_of_each_at_most(tasks: Tasks, vm: FakeVm) -> None:
    session = await MockAgent(tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    process = await execute(session, "cat")
    await process.write_stdin(bytes(2 * BUFFER_BYTES))
    blocked = asyncio.ensure_future(process.write_stdin(b"x"))
    await asyncio.sleep(0)
    assert not blocked.done()
    assert await anext(process.output()) == ("stdout", bytes(BUFFER_BYTES))
    await asyncio.wait_for(blocked, LIMIT_S)
    await process.close_stdin()
    rest = b"".join([data async for _, data in process.output()])
    assert rest == bytes(BUFFER_BYTES) + b"x"
    assert await process.wait() == ProcessExit(0)


async def test_process_sleeps_between_its_outputs(tasks: Tasks, vm: FakeVm) -> None:
    session = await MockAgent(tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    process = await execute(session, "sh", "-c", "echo a; sleep 0.01; echo b; exit 3")
    output = process.output()
    assert await anext(output) == ("stdout", b"a\n")
    assert await anext(output) == ("stdout", b"b\n")
    assert await process.wait() == ProcessExit(3)


async def test_killed_process_forgets_its_sleep(tasks: Tasks, vm: FakeVm) -> None:
    session = await MockAgent(tasks=tasks).connect(vm.as_vm, timeout_s=LIMIT_S)
    process = await execute(session, "sh", "-c", "sleep 1000; echo never")
    await process.signal(15)
    assert await process.wait() == ProcessExit(143)
    assert [data async for _, data in process.output()] == []


async def test_a_guest_whose_vcpus_are_stopped_answers_nothing_and_no_process_ends(
    tasks: Tasks, vm: FakeVm
) -> None:
    agent = MockAgent(tasks=tasks)
    session = await agent.connect(vm.as_vm, timeout_s=LIMIT_S)
    await session.create_container(sleeper("c", "true"), timeout_s=LIMIT_S)
    await session.start_container("c", timeout_s=LIMIT_S)
    vm.paused = True
    with pytest.raises(DeadlineExceededError):
        await session.ping(timeout_s=0.01)
    with pytest.raises(AgentError):
        await agent.connect(vm.as_vm, timeout_s=0.01)
    vm.paused = False
    assert [c.state for c in await session.list_containers(timeout_s=LIMIT_S)] == ["running"]
    await session.set_clock(0, timeout_s=LIMIT_S)
    assert await anext(session.events()) == ContainerExited("c", 0, oom_killed=False)
