"""Volumes and sockets of pods: what the VM and the guest get, when, and how long."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    HypervisorError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    VcnodeError,
)
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, ContainerSpec, PodState
from vcnode.models.volumes import MAX_TAG_BYTES, Mount, Socket, Volume, VolumeDriver
from vcnode.pods.volumes import device_tag, disk_id, is_device

DATA = Volume(mount_tag="data", host_path="/roots/data")
DISK = Volume(mount_tag="disk", device="/roots/disk", fs="ext4")
FAST = Volume(mount_tag="fast", host_path="/roots/fast", driver=VolumeDriver.VIRTIO_FS)


def with_mounts(container_id: str, *sources: str) -> ContainerSpec:
    mounts = tuple(Mount(source=source, destination=f"/mnt/{source}") for source in sources)
    return container(container_id, mounts=mounts)


def vm_of(world: World) -> Any:
    record = world.store.pods["p1"]
    assert record.vm is not None
    return world.vms.machines[record.vm.vm_id]


def shares(world: World) -> set[str]:
    return {name for _, name in world.host.shares if "." in name}


async def test_a_volume_is_there_as_long_as_a_container_mounts_it(world: World) -> None:
    spec = pod(containers=[with_mounts("c1", "data", "disk/sub")], volumes=(DATA, DISK))
    await world.pods.create(spec, world.call())
    await world.pods.create_container("p1", with_mounts("c2", "data"), world.call())
    await world.pods.start("p1", world.call())
    assert shares(world) == {"volume.data"}
    assert disk_id(DISK) in vm_of(world).disks
    [guest] = world.guests.by_vm_id.values()
    first, second = guest.containers["c1"].spec.mounts
    assert (first.shared_name, first.path, first.destination) == ("volume.data", "", "/mnt/data")
    assert (second.disk_id, second.fs, second.path) == (disk_id(DISK), "ext4", "sub")

    await world.pods.delete_container("p1", "c1", True, world.call())
    assert shares(world) == {"volume.data"}
    assert disk_id(DISK) not in vm_of(world).disks
    await world.pods.delete_container("p1", "c2", True, world.call())
    assert shares(world) == set()


async def test_a_running_pod_gets_and_loses_a_volume(world: World) -> None:
    await world.pods.run(pod(), world.call())
    status = await world.pods.attach_volume("p1", DATA, world.call())
    assert status.volumes == (DATA,)
    assert (await world.pods.attach_volume("p1", DATA, world.call())).revision == status.revision
    with pytest.raises(AlreadyExistsError):
        await world.pods.attach_volume("p1", DATA.model_copy(update={"read_only": True}), world.call())
    await world.pods.create_container("p1", with_mounts("c2", "data"), world.call())
    await world.pods.start_container("p1", "c2", world.call())
    assert shares(world) == {"volume.data"}
    with pytest.raises(FailedPreconditionError, match="mounted by c2"):
        await world.pods.detach_volume("p1", "data", world.call())
    await world.pods.delete_container("p1", "c2", True, world.call())
    await world.pods.detach_volume("p1", "data", world.call())
    assert (await world.pods.detach_volume("p1", "data", world.call())).volumes == ()
    kinds = await world.kinds()
    assert [kinds.count(f"pod.volume_{what}") for what in ("attached", "detached")] == [1, 1]


async def test_what_needs_a_boot_is_not_given_to_a_running_pod(world: World) -> None:
    await world.pods.run(pod(), world.call())
    with pytest.raises(FailedPreconditionError, match="start"):
        await world.pods.attach_volume("p1", FAST, world.call())
    await world.pods.stop("p1", 0, world.call())
    await world.pods.attach_volume("p1", FAST, world.call())
    await world.pods.start("p1", world.call())
    [share] = vm_of(world).spec.shares
    assert (share.tag, share.virtio_fs) == ("fast", True)
    assert share.directory.endswith("/shared/volume.fast")
    assert vm_of(world).spec.clone_of is None


async def test_virtio_fs_does_not_go_with_a_template(world: World) -> None:
    with pytest.raises(InvalidArgumentError, match=r"volumes\[0\].driver"):
        await world.pods.create(pod(volumes=(FAST,), template="require"), world.call())


@pytest.mark.parametrize(
    ("mount", "field"),
    [
        (Mount(source="other", destination="/d"), "no volume"),
        (Mount(type="socket", source="data", destination="/d"), "no socket"),
    ],
)
async def test_a_mount_names_what_the_pod_has(world: World, mount: Mount, field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"containers\[0\].mounts\[0\].source.*{field}"):
        await world.pods.create(
            pod(containers=[container("c1", mounts=(mount,))], volumes=(DATA,)), world.call()
        )


@pytest.mark.parametrize(
    ("path", "error"), [("/roots/missing", NotFoundError), ("/elsewhere", InvalidArgumentError)]
)
async def test_a_volume_lies_below_the_allowed_roots(world: World, path: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"pod.volumes\[0\].host_path"):
        await world.pods.create(pod(volumes=(Volume(mount_tag="data", host_path=path),)), world.call())
    volume = Volume(mount_tag="data", device=path, fs="erofs", read_only=True)
    with pytest.raises(error, match=r"pod.volumes\[0\].device"):
        await world.pods.create(pod(volumes=(volume,)), world.call())


@pytest.mark.parametrize("operation", ["storage.share", "vm.attach_disk", "agent.create_container"])
async def test_a_failed_start_of_a_container_leaves_no_volume(world: World, operation: str) -> None:
    await world.pods.run(pod(volumes=(DATA, DISK)), world.call())
    await world.pods.create_container("p1", with_mounts("c2", "data", "disk"), world.call())
    world.plan.failing = (operation,)
    with pytest.raises((StorageError, HypervisorError)):
        await world.pods.start_container("p1", "c2", world.call())
    world.plan.failing = ()
    assert shares(world) == set()
    assert disk_id(DISK) not in vm_of(world).disks
    await world.pods.start_container("p1", "c2", world.call())
    assert shares(world) == {"volume.data"}


async def test_sockets_are_connected_by_the_start_and_go_with_the_vm(world: World) -> None:
    sockets = (
        Socket(name="one", host_path="/roots/one.sock"),
        Socket(name="two", host_path="/roots/two.sock", mode="connect", id="mine", device_id="dev"),
    )
    status = await world.pods.run(pod(sockets=sockets), world.call())
    assert status.sockets == sockets
    assert list(world.host.sockets) == ["/roots/one.sock"]
    assert world.plan.log.count("vm.attach_port") == 2
    await world.pods.stop("p1", 0, world.call())
    assert world.host.sockets == {}


@pytest.mark.parametrize("mode", ["listen", "connect"])
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/etc/a.sock", InvalidArgumentError),
        ("/roots/../etc/a.sock", InvalidArgumentError),
        ("/roots", InvalidArgumentError),
        ("/a.sock", InvalidArgumentError),
        ("/roots/missing/a.sock", NotFoundError),
    ],
)
async def test_a_socket_lies_below_an_allowed_root(
    world: World, mode: Literal["listen", "connect"], path: str, error: type[VcnodeError]
) -> None:
    sockets = (Socket(name="one", host_path=path, mode=mode),)
    with pytest.raises(error, match=r"^pod\.sockets\[0\]\.host_path: "):
        await world.pods.create(pod(sockets=sockets), world.call())


async def test_a_port_of_the_agent_is_no_name_for_a_socket(world: World) -> None:
    (channel,) = world.agent.channels(AgentConfig())
    with pytest.raises(InvalidArgumentError, match=r"^pod\.sockets\[0\]\.name: .* port of the pod's agent"):
        await world.pods.create(pod(sockets=(Socket(name=channel.name, host_path="/roots/a"),)), world.call())


async def test_the_path_of_a_socket_to_connect_to_is_not_too_long(world: World) -> None:
    long = "/roots/" + "a" * 100
    for path in (long, long + "b"):
        sockets = (Socket(name="one", host_path=path),)
        if path == long:
            await world.pods.create(pod(sockets=sockets), world.call())
            continue
        with pytest.raises(InvalidArgumentError, match=r"^pod\.sockets\[0\]\.host_path: .*107 bytes"):
            await world.pods.create(pod("p2", sockets=sockets), world.call())


def test_an_id_that_another_socket_has_by_default_is_refused() -> None:
    sockets = (
        Socket(name="one", host_path="/roots/one.sock", id="port1"),
        Socket(name="two", host_path="/roots/two.sock"),
    )
    with pytest.raises(ValueError, match="port1 is used more than once"):
        pod(sockets=sockets)
    pod(sockets=(sockets[0].model_copy(update={"id": "port0"}), sockets[1]))


async def test_a_socket_that_cannot_be_had_undoes_the_start(world: World) -> None:
    sockets = (
        Socket(name="one", host_path="/roots/one.sock"),
        Socket(name="two", host_path="/roots/missing", mode="connect"),
    )
    await world.pods.create(pod(sockets=sockets), world.call())
    with pytest.raises(NotFoundError):
        await world.pods.start("p1", world.call())
    assert world.pods.status("p1").state is PodState.FAILED
    assert world.host.empty
    assert not world.vms.alive


def test_long_tags_become_short_and_stay_distinct() -> None:
    tags = ["ctr-rootfs-0123456789abcdef-and-more" + end for end in "ab"]
    short = [device_tag(tag) for tag in tags]
    assert len(set(short)) == 2
    assert all(len(tag) == MAX_TAG_BYTES for tag in short)
    assert device_tag("x" * MAX_TAG_BYTES) == "x" * MAX_TAG_BYTES


def test_a_guest_without_our_agent_has_its_volumes_as_devices() -> None:
    other = DriverInfo(type="sshd", capabilities=("exec",))
    ours = DriverInfo(type="native", capabilities=("mounts",))
    assert [is_device(v, other) for v in (DATA, DISK, FAST)] == [True, False, True]
    assert [is_device(v, ours) for v in (DATA, DISK, FAST)] == [False, False, True]
