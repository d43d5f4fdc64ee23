"""Commands about pods, on mock drivers."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.unit.pods.world import SMALL, World, container, pod
from vcnode.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    HypervisorError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from vcnode.models.commands import ExecOptions
from vcnode.models.network import NetworkModel
from vcnode.models.pod import AgentType, Cmd, HypervisorConfig, HypervisorType, PodState, Resources


async def test_create_starts_nothing(world: World) -> None:
    status = await world.pods.create(pod(), world.call())
    assert status.state is PodState.READY
    assert status.containers[0].state == "ready"
    assert world.leaks == []
    assert await world.kinds() == ["pod.created", "container.created"]


async def test_the_same_create_twice_succeeds_and_says_the_same(world: World) -> None:
    first = await world.pods.create(pod(), world.call())
    assert await world.pods.create(pod(), world.call()) == first
    assert await world.kinds() == ["pod.created", "container.created"]


async def test_create_of_another_spec_under_the_same_id_is_refused(world: World) -> None:
    await world.pods.create(pod(), world.call())
    with pytest.raises(AlreadyExistsError):
        await world.pods.create(pod(labels={"a": "b"}), world.call())


async def test_a_pod_without_id_gets_one(world: World) -> None:
    spec = pod(containers=[container().model_copy(update={"id": None})]).model_copy(update={"id": None})
    status = await world.pods.create(spec, world.call())
    assert status.pod_id.startswith("pod-")
    assert status.containers[0].container_id.startswith("ctr-")


@pytest.mark.parametrize(
    ("spec", "error", "field"),
    [
        (pod(containers=[container(rootfs="/etc")]), InvalidArgumentError, "pod.containers[0].rootfs"),
        (pod(containers=[container(rootfs="/roots/missing")]), NotFoundError, "pod.containers[0].rootfs"),
        (pod(containers=[container(image="nope")]), NotFoundError, "pod.containers[0].image"),
        (
            pod(containers=[container(cmd=Cmd(args=("a",), capabilities=("CAP_FLY",)))]),
            InvalidArgumentError,
            "pod.containers[0].cmd.capabilities[0]",
        ),
        (pod(hypervisor_type=HypervisorType.QEMU), UnsupportedError, "pod.hypervisor_type"),
        (pod(agent_type=AgentType.SSHD), UnsupportedError, "pod.agent_type"),
        (pod(agent_type=AgentType.NOOP), UnsupportedError, "pod.containers"),
        (
            pod(hypervisor_config=HypervisorConfig(kernel_path="/etc/vmlinux")),
            InvalidArgumentError,
            "pod.hypervisor_config.kernel_path",
        ),
        (
            pod(hypervisor_config=HypervisorConfig(initrd_path="/roots/missing/initrd")),
            NotFoundError,
            "pod.hypervisor_config.initrd_path",
        ),
        (
            pod(hypervisor_config=HypervisorConfig(image_path="/etc/disk")),
            InvalidArgumentError,
            "pod.hypervisor_config.image_path",
        ),
        (pod(network_model=NetworkModel.CNI), UnsupportedError, "pod.network_model"),
    ],
)
async def test_a_spec_that_cannot_work_is_refused_by_field(world, spec, error, field) -> None:
    with pytest.raises(error) as caught:
        await world.pods.create(spec, world.call())
    assert caught.value.message.startswith(f"{field}: ")
    assert world.pods.list({}, ()).pods == ()
    assert await world.kinds() == []


async def test_the_pod_limit_holds(tmp_path) -> None:
    world = await World(tmp_path, limits=SMALL).start()
    for name in "abc":
        await world.pods.create(pod(name), world.call())
    with pytest.raises(ResourceExhaustedError):
        await world.pods.create(pod("d"), world.call())
    await world.close()


async def test_start_runs_the_pod_and_its_containers_and_says_how_long_each_phase_took(world: World) -> None:
    await world.pods.create(pod(), world.call())
    call = world.call("pod.start")
    status = await world.pods.start("p1", call)
    assert status.state is PodState.RUNNING
    assert status.hypervisor is not None
    assert status.mock
    assert status.network is not None
    assert status.network.created
    assert [(c.state, c.pid) for c in status.containers] == [("running", 100)]
    phases = ["queue", "network", "storage", "template", "qemu", "boot", "configure", "containers", "total"]
    assert list(status.phases_ms) == phases
    assert [name for name, _ in world.observed.phases] == phases
    events = await world.events()
    assert [e.kind for e in events[2:]] == ["pod.starting", "container.started", "pod.started"]
    assert {e.commandid for e in events[2:]} == {call.command_id}
    assert all(e.mock for e in events)
    assert events[-1].data["state"] == "running"


async def test_a_vm_boots_what_its_pod_names_and_the_files_are_closed_after(world: World) -> None:
    before = len(os.listdir("/proc/self/fd"))
    own = HypervisorConfig(kernel_path="/roots/vmlinux", initrd_path="/roots/initrd")
    await world.pods.run(pod(hypervisor_config=own), world.call())
    (machine,) = world.vms.machines.values()
    config = machine.spec.config
    assert [config.kernel, config.initrd] == [f"/proc/self/fd/{fd}" for fd in config.file_fds]
    assert len(os.listdir("/proc/self/fd")) == before


async def test_start_configures_the_guest(world: World) -> None:
    await world.pods.run(pod("my_pod"), world.call())
    (guest,) = world.guests.by_vm_id.values()
    assert guest.config is not None
    assert guest.config.hostname == "my-pod"
    assert len(guest.config.entropy) >= 32
    assert len(guest.config.machine_id) == 32
    assert [e.name for e in guest.config.endpoints] == ["eth0"]


async def test_start_of_a_running_pod_is_refused_with_the_allowed_states(world: World) -> None:
    await world.pods.run(pod(), world.call())
    with pytest.raises(FailedPreconditionError) as caught:
        await world.pods.start("p1", world.call("pod.start"))
    assert caught.value.details == {"state": "running", "allowed": ["failed", "ready", "stopped"]}


async def test_commands_on_an_unknown_pod_are_not_found(world: World) -> None:
    call = world.call()
    for command in (
        world.pods.start("x", call),
        world.pods.stop("x", None, call),
        world.pods.start_container("x", "c", call),
        world.pods.exec("x", None, ExecOptions(cmd=Cmd(args=("true",))), call),
    ):
        with pytest.raises(NotFoundError):
            await command
    with pytest.raises(NotFoundError):
        world.pods.status("x")


async def test_another_revision_than_expected_is_refused_with_both(world: World) -> None:
    status = await world.pods.create(pod(), world.call())
    with pytest.raises(FailedPreconditionError) as caught:
        await world.pods.start("p1", world.call("pod.start", revision=status.revision + 1))
    assert caught.value.details == {"revision": 1, "expected": 2}
    await world.pods.start("p1", world.call("pod.start", revision=status.revision))


async def test_stop_frees_everything_and_keeps_the_pod(world: World) -> None:
    await world.pods.run(pod(), world.call())
    stopped = await world.pods.stop("p1", None, world.call("pod.stop"))
    assert stopped.outcome == "graceful"
    assert stopped.pod.state is PodState.STOPPED
    assert stopped.pod.hypervisor is None
    assert [(c.state, c.exit_code) for c in stopped.pod.containers] == [("stopped", 143)]
    assert world.leaks == []
    assert (await world.kinds())[-3:] == ["pod.stopping", "container.exited", "pod.stopped"]


async def test_stop_without_grace_kills(world: World) -> None:
    await world.pods.run(pod(), world.call())
    stopped = await world.pods.stop("p1", 0, world.call("pod.stop"))
    assert stopped.outcome == "forced"
    assert stopped.pod.containers[0].reason == "The pod's VM ended."
    assert world.leaks == []


async def test_stop_is_idempotent_and_absent_where_nothing_ran(world: World) -> None:
    await world.pods.create(pod(), world.call())
    assert (await world.pods.stop("p1", None, world.call("pod.stop"))).outcome == "absent"
    assert world.pods.status("p1").state is PodState.READY
    await world.pods.start("p1", world.call("pod.start"))
    await world.pods.stop("p1", None, world.call("pod.stop"))
    again = await world.pods.stop("p1", None, world.call("pod.stop"))
    assert (again.outcome, again.pod.state) == ("absent", PodState.STOPPED)


async def test_a_stopped_pod_starts_again_in_a_new_vm(world: World) -> None:
    first = await world.pods.run(pod(), world.call())
    await world.pods.stop("p1", None, world.call("pod.stop"))
    second = await world.pods.start("p1", world.call("pod.start"))
    assert first.hypervisor is not None
    assert second.hypervisor is not None
    assert first.hypervisor.vm_id != second.hypervisor.vm_id
    assert second.containers[0].state == "running"
    assert second.containers[0].exit_code is None


async def test_delete_of_a_running_pod_needs_force(world: World) -> None:
    await world.pods.run(pod(), world.call())
    with pytest.raises(FailedPreconditionError) as caught:
        await world.pods.delete("p1", False, world.call("pod.delete"))
    assert caught.value.details["state"] == "running"
    assert world.pods.status("p1").state is PodState.RUNNING
    assert len(world.taps) == 1
    assert (await world.pods.delete("p1", True, world.call("pod.delete"))).existed
    assert world.leaks == []
    assert world.pods.list({}, ()).pods == ()
    assert (await world.kinds())[-1] == "pod.deleted"


async def test_delete_of_an_absent_pod_succeeds(world: World) -> None:
    assert not (await world.pods.delete("x", False, world.call("pod.delete"))).existed


async def test_list_selects_by_labels_and_state_in_the_order_of_creation(world: World) -> None:
    await world.pods.create(pod("b", labels={"app": "x", "tier": "1"}), world.call())
    await world.pods.create(pod("a", labels={"app": "x"}), world.call())
    await world.pods.run(pod("c"), world.call())

    def ids(labels: dict[str, str], *states: PodState) -> list[str]:
        return [p.pod_id for p in world.pods.list(labels, states).pods]

    assert ids({}) == ["b", "a", "c"]
    assert ids({"app": "x"}) == ["b", "a"]
    assert ids({"app": "x", "tier": "1"}) == ["b"]
    assert ids({}, PodState.RUNNING) == ["c"]
    assert ids({"app": "y"}) == []


async def test_a_pod_without_agent_runs_and_stops_without_waiting_for_a_guest(world: World) -> None:
    spec = pod(containers=[], agent_type=AgentType.NOOP)
    assert (await world.pods.run(spec, world.call())).state is PodState.RUNNING
    with pytest.raises(UnsupportedError):
        await world.pods.exec("p1", None, ExecOptions(cmd=Cmd(args=("true",))), world.call())
    stopped = await world.pods.stop("p1", 600, world.call("pod.stop"))
    assert stopped.pod.state is PodState.STOPPED
    assert world.leaks == []


@pytest.mark.parametrize(
    "fault",
    [
        "network.attach:1=fail",
        "storage.make_vm_dir:1=fail",
        "network.open_taps:1=fail",
        "hypervisor.launch:1=fail",
        "agent.connect:1=fail",
        "agent.configure:1=fail",
        "storage.share:1=fail",
        "agent.create_container:1=fail",
        "agent.start_container:1=fail",
        "agent.start_container:1=die",
    ],
)
async def test_a_failed_start_is_undone_explained_and_can_be_tried_again(tmp_path, fault: str) -> None:
    world = await World(tmp_path, fault).start()
    await world.pods.create(pod(), world.call())
    with pytest.raises(Exception, match="fault plan"):
        await world.pods.start("p1", world.call("pod.start"))
    status = world.pods.status("p1")
    assert status.state is PodState.FAILED
    assert "fault plan" in (status.reason or "")
    assert status.leftovers == ()
    assert world.leaks == []
    assert (await world.kinds("p1"))[-1] == "pod.failed"
    assert (await world.pods.start("p1", world.call("pod.start"))).state is PodState.RUNNING
    assert world.pods.status("p1").reason is None
    await world.close()


async def test_a_run_whose_start_fails_leaves_no_pod(tmp_path) -> None:
    world = await World(tmp_path, "hypervisor.launch:1=fail").start()
    with pytest.raises(HypervisorError):
        await world.pods.run(pod(), world.call("pod.run"))
    assert world.pods.list({}, ()).pods == ()
    assert world.leaks == []
    assert (await world.kinds("p1")) == ["pod.created", "pod.starting", "pod.failed", "pod.deleted"]
    await world.close()


async def test_a_start_waits_for_its_slot_and_counts_that_as_queue(tmp_path) -> None:
    world = await World(tmp_path, "hypervisor.launch:1=delay(0.2)", limits=SMALL).start()
    both = await asyncio.gather(
        world.pods.run(pod("a"), world.call("pod.run")), world.pods.run(pod("b"), world.call("pod.run"))
    )
    first, second = sorted(status.phases_ms["queue"] for status in both)  # either may come first
    assert second - first > 150
    await world.close()


async def test_a_second_command_on_a_busy_pod_is_aborted(tmp_path) -> None:
    world = await World(tmp_path, "agent.connect:1=hang").start()
    await world.pods.create(pod(), world.call())
    start = asyncio.ensure_future(world.pods.start("p1", world.call("pod.start")))
    await world.until_event("pod.starting")
    with pytest.raises(AbortedError) as caught:
        await world.pods.create_container("p1", container("c2"), world.call("container.create"))
    assert caught.value.retryable
    assert world.pods.status("p1").state is PodState.STARTING
    start.cancel()
    await asyncio.wait([start])
    await world.close()


@pytest.mark.parametrize("verb", ["pod.start", "pod.run"])
@pytest.mark.parametrize("overtaker", ["stop", "delete", "cancel"])
async def test_a_hanging_start_is_undone_when_overtaken(tmp_path, verb: str, overtaker: str) -> None:
    world = await World(tmp_path, "agent.connect:1=hang").start()
    if verb == "pod.start":
        await world.pods.create(pod(), world.call())
        start = asyncio.ensure_future(world.pods.start("p1", world.call(verb)))
    else:
        start = asyncio.ensure_future(world.pods.run(pod(), world.call(verb)))
    while "agent.connect" not in world.plan.log:  # noqa: ASYNC110 -- bounded by the test's limit
        await asyncio.sleep(0)
    match overtaker:
        case "stop":
            stopped = await world.pods.stop("p1", None, world.call("pod.stop"))
            assert stopped.pod.state is PodState.STOPPED
        case "delete":
            assert (await world.pods.delete("p1", False, world.call("pod.delete"))).existed is (
                verb == "pod.start"
            )
        case "cancel":
            start.cancel()
    with pytest.raises(asyncio.CancelledError if overtaker == "cancel" else AbortedError):
        await start
    assert world.leaks == []
    left = [p.state for p in world.pods.list({}, ()).pods]
    kept = overtaker == "stop" or (overtaker == "cancel" and verb == "pod.start")
    assert left == ([PodState.STOPPED] if kept else [])
    await world.close()


async def test_too_little_memory_refuses_a_start_on_a_real_hypervisor_only(world: World) -> None:
    spec = pod(resources=Resources(mem_size_mib=1_000_000))
    assert (await world.pods.run(spec, world.call())).state is PodState.RUNNING
