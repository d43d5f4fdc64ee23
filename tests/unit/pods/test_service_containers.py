"""Commands about containers and images, and exec."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.errors import (
    AbortedError,
    AgentError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
)
from vcnode.models.base import Blob
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, ContainerState, ContainerStatus


def options(*args: str, **fields: object) -> ExecOptions:
    return ExecOptions(cmd=Cmd(args=args), **fields)  # type: ignore[arg-type]


async def until_stopped(world: World, cid: str = "c1") -> ContainerStatus:
    await world.until_event("container.exited")
    return world.pods.container_status("p1", cid)


# ---- life of a container -----------------------------------------------------------------------------


async def test_a_container_added_to_a_running_pod_starts_when_told(world: World) -> None:
    await world.pods.run(pod(), world.call())
    created = await world.pods.create_container("p1", container("c2"), world.call())
    assert created.state is ContainerState.READY
    started = await world.pods.start_container("p1", "c2", world.call())
    assert (started.state, started.pid) == (ContainerState.RUNNING, 101)
    assert [c.container_id for c in world.pods.list_containers("p1", ()).containers] == ["c1", "c2"]


async def test_a_container_added_to_a_pod_that_does_not_run_starts_with_it(world: World) -> None:
    await world.pods.create(pod(), world.call())
    await world.pods.create_container("p1", container("c2"), world.call())
    status = await world.pods.start("p1", world.call())
    assert [c.state for c in status.containers] == ["running", "running"]
    with pytest.raises(FailedPreconditionError):
        await world.pods.start_container("p1", "c2", world.call())


async def test_the_same_container_twice_is_one_and_another_of_its_id_is_refused(world: World) -> None:
    await world.pods.create(pod(), world.call())
    first = await world.pods.create_container("p1", container("c2"), world.call())
    assert await world.pods.create_container("p1", container("c2"), world.call()) == first
    with pytest.raises(AlreadyExistsError):
        await world.pods.create_container("p1", container("c2", "true"), world.call())
    assert (await world.kinds()).count("container.created") == 2


async def test_a_bad_container_is_refused_by_field(world: World) -> None:
    await world.pods.create(pod(), world.call())
    with pytest.raises(NotFoundError, match=r"^container\.image: "):
        await world.pods.create_container("p1", container("c2", image="nope"), world.call())


@pytest.mark.parametrize(("args", "code"), [(("true",), 0), (("exit", "7"), 7), (("nonsense",), 127)])
async def test_a_container_that_ends_at_once_is_recorded_as_started_then_exited(
    world: World, args: tuple[str, ...], code: int
) -> None:
    await world.pods.create(pod(containers=[container("c1", *args)]), world.call())
    await world.pods.start("p1", world.call())
    status = await until_stopped(world)
    assert (status.state, status.exit_code, status.pid) == (ContainerState.STOPPED, code, None)
    assert (await world.kinds("p1/c1")) == ["container.created", "container.started", "container.exited"]
    assert world.pods.status("p1").state == "running"


async def test_a_stopped_container_starts_again_on_its_root(world: World) -> None:
    await world.pods.run(pod(), world.call())
    stopped = await world.pods.stop_container("p1", "c1", None, world.call())
    assert (stopped.state, stopped.exit_code) == (ContainerState.STOPPED, 143)
    again = await world.pods.start_container("p1", "c1", world.call())
    assert (again.state, again.exit_code, again.pid) == (ContainerState.RUNNING, None, 101)
    assert world.plan.calls["storage.share"] == 1


async def test_stop_without_grace_kills_and_stop_of_a_stopped_one_changes_nothing(world: World) -> None:
    await world.pods.run(pod(), world.call())
    stopped = await world.pods.stop_container("p1", "c1", 0, world.call())
    assert stopped.exit_code == 137
    assert await world.pods.stop_container("p1", "c1", None, world.call()) == stopped


async def test_a_container_that_ignores_its_stop_signal_is_killed_after_the_grace(world: World) -> None:
    spec = container("c1", stop_signal=17)  # SIGCHLD: nothing happens
    await world.pods.run(pod(containers=[spec]), world.call())
    stopped = await world.pods.stop_container("p1", "c1", 0.01, world.call())
    assert stopped.exit_code == 137


async def test_kill_sends_a_signal_to_a_running_container_only(world: World) -> None:
    await world.pods.run(pod(), world.call())
    assert (await world.pods.kill_container("p1", "c1", 17, False, world.call())).state == "running"
    await world.pods.kill_container("p1", "c1", 10, False, world.call())
    assert (await until_stopped(world)).exit_code == 138
    with pytest.raises(FailedPreconditionError):
        await world.pods.kill_container("p1", "c1", 9, False, world.call())


async def test_delete_of_a_running_container_needs_force_and_frees_its_root(world: World) -> None:
    await world.pods.run(pod(), world.call())
    with pytest.raises(FailedPreconditionError):
        await world.pods.delete_container("p1", "c1", False, world.call())
    assert (await world.pods.delete_container("p1", "c1", True, world.call())).existed
    assert not (await world.pods.delete_container("p1", "c1", True, world.call())).existed
    assert world.host.shares == {}
    assert world.pods.status("p1").containers == ()
    (guest,) = world.guests.by_vm_id.values()
    assert guest.containers == {}


async def test_containers_of_one_image_share_a_disk_until_the_last_is_gone(world: World) -> None:
    await world.images.import_("app", "/roots/app", world.call())
    specs = [container("c1", image="app"), container("c2", image="app")]
    await world.pods.run(pod(containers=specs), world.call())
    (machine,) = world.vms.alive
    digest = world.images.status("app").digest
    assert list(machine.disks) == [f"d-{digest.removeprefix('sha256:')[:16]}"]
    assert all(disk.read_only and len(disk.disk_id) <= 20 for disk in machine.disks.values())
    await world.pods.delete_container("p1", "c1", True, world.call())
    assert len(machine.disks) == 1
    await world.pods.delete_container("p1", "c2", True, world.call())
    assert machine.disks == {}


@pytest.mark.parametrize("op", ["agent.create_container", "agent.start_container"])
async def test_a_container_start_that_fails_is_undone_and_can_be_tried_again(tmp_path, op: str) -> None:
    world = await World(tmp_path, f"{op}:2=fail").start()
    await world.images.import_("app", "/roots/app", world.call())
    await world.pods.run(pod(), world.call())
    await world.pods.create_container("p1", container("c2", image="app"), world.call())
    with pytest.raises(AgentError):
        await world.pods.start_container("p1", "c2", world.call())
    (machine,) = world.vms.alive
    assert machine.disks == {}
    assert world.pods.container_status("p1", "c2").state == "ready"
    assert (await world.pods.start_container("p1", "c2", world.call())).state == "running"
    await world.close()


async def test_the_end_of_a_container_that_cannot_be_saved_is_told_and_saved_later(world: World) -> None:
    await world.pods.run(pod(), world.call())
    world.plan.failing = ("commit",)
    with pytest.raises(StorageError, match="cannot be written"):
        await world.pods.stop_container("p1", "c1", None, world.call())
    assert world.pods.unsaved
    world.plan.failing = ()
    assert (await until_stopped(world)).exit_code == 143


# ---- exec --------------------------------------------------------------------------------------------


async def test_exec_gives_exit_code_and_output(world: World) -> None:
    await world.pods.run(pod(), world.call())
    result = await world.pods.exec(
        "p1", "c1", options("sh", "-c", "echo out; echo err >&2; exit 3"), world.call()
    )
    assert result.exit_code == 3
    assert (result.stdout.data, result.stderr.data) == ("out\n", "err\n")
    assert not result.timed_out
    assert not result.stdout.truncated


async def test_exec_passes_stdin_of_every_byte_value(world: World) -> None:
    await world.pods.run(pod(), world.call())
    data = bytes(range(256)) * 100
    result = await world.pods.exec("p1", "c1", options("cat", stdin=Blob.of(data)), world.call())
    assert result.stdout.raw == data
    assert result.stdout.encoding == "base64"


async def test_exec_keeps_the_first_bytes_and_counts_the_rest(world: World) -> None:
    await world.pods.run(pod(), world.call())
    wanted = options("cat", stdin=Blob.of(b"x" * 100_000), max_output_bytes=10)
    result = await world.pods.exec("p1", "c1", wanted, world.call())
    assert result.stdout.data == "x" * 10
    assert (result.stdout.truncated, result.stdout.total_bytes) == (True, 100_000)


async def test_exec_kills_what_takes_too_long_and_keeps_what_it_said(world: World) -> None:
    await world.pods.run(pod(), world.call())
    wanted = options("sh", "-c", "echo begun; sleep infinity", timeout_s=0.05)
    result = await world.pods.exec("p1", "c1", wanted, world.call())
    assert result.timed_out
    assert result.exit_code == 137
    assert result.stdout.data == "begun\n"


async def test_exec_runs_in_the_guest_itself_without_a_container(world: World) -> None:
    await world.pods.run(pod("my_pod"), world.call())
    result = await world.pods.exec("my_pod", None, options("hostname"), world.call())
    assert result.stdout.data == "my-pod\n"


async def test_exec_of_nothing_in_a_stopped_or_unknown_place_is_refused(world: World) -> None:
    await world.pods.run(pod(), world.call())
    with pytest.raises(InvalidArgumentError):
        await world.pods.exec("p1", "c1", ExecOptions(cmd=Cmd()), world.call())
    with pytest.raises(NotFoundError):
        await world.pods.exec("p1", "c9", options("true"), world.call())
    await world.pods.stop_container("p1", "c1", 0, world.call())
    with pytest.raises(FailedPreconditionError):
        await world.pods.exec("p1", "c1", options("true"), world.call())
    await world.pods.stop("p1", 0, world.call())
    with pytest.raises(FailedPreconditionError):
        await world.pods.exec("p1", None, options("true"), world.call())


@pytest.mark.parametrize("how", ["cancel", "stop"])
async def test_an_exec_whose_caller_or_pod_goes_away_ends(world: World, how: str) -> None:
    await world.pods.run(pod(), world.call())
    task = asyncio.ensure_future(world.pods.exec("p1", "c1", options("sleep", "infinity"), world.call()))
    while not world.plan.calls["agent.execute"]:  # noqa: ASYNC110 -- bounded by the test's limit
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    if how == "cancel":
        task.cancel()
    else:
        await world.pods.stop("p1", 0, world.call("pod.stop"))
    with pytest.raises(asyncio.CancelledError if how == "cancel" else AbortedError):
        await task
    execs = [p for g in world.guests.by_vm_id.values() for c in g.containers.values() for p in c.execs]
    assert all(p.has_ended for p in execs)


# ---- images ------------------------------------------------------------------------------------------


async def test_an_image_is_imported_listed_used_and_removed(world: World) -> None:
    image = await world.images.import_("app", "/roots/app", world.call())
    assert not image.in_use
    await world.pods.create(pod(containers=[container(image="app")]), world.call())
    (listed,) = world.images.list().images
    assert listed.in_use
    assert listed.last_used_at is not None
    assert listed.model_copy(update={"in_use": False, "last_used_at": None}) == image
    assert world.pods.container_status("p1", "c1").image_digest == image.digest
    with pytest.raises(FailedPreconditionError) as caught:
        await world.images.remove("app", world.call())
    assert caught.value.details["containers"] == ["p1/c1"]
    await world.pods.delete("p1", False, world.call())
    assert (await world.images.remove("app", world.call())).existed
    assert not (await world.images.remove("app", world.call())).existed
    assert world.host.images == {}
    with pytest.raises(NotFoundError):
        world.images.status("app")
    assert await world.kinds("image/app") == ["image.imported", "image.removed"]


async def test_a_container_keeps_the_file_that_its_image_was(world: World) -> None:
    first = await world.images.import_("app", "/roots/app", world.call())
    await world.pods.create(pod(containers=[container(image="app")]), world.call())
    second = await world.images.import_("app", "/roots/app2", world.call())
    assert set(world.host.images) == {first.digest, second.digest}
    await world.pods.start("p1", world.call())
    assert world.pods.container_status("p1", "c1").image_digest == first.digest


async def test_two_names_of_one_file_keep_it_until_both_are_gone(world: World) -> None:
    for name in ("a", "b"):
        await world.images.import_(name, "/roots/app", world.call())
    await world.images.remove("a", world.call())
    assert len(world.host.images) == 1
    await world.images.remove("b", world.call())
    assert world.host.images == {}


async def test_a_second_import_of_a_name_under_way_is_aborted(tmp_path) -> None:
    world = await World(tmp_path, "storage.build_image:1=delay(0.05)").start()
    first = asyncio.ensure_future(world.images.import_("app", "/roots/app", world.call()))
    await asyncio.sleep(0)
    with pytest.raises(AbortedError):
        await world.images.import_("app", "/roots/app", world.call())
    await first
    await world.close()
