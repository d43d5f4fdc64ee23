"""Volumes of pods and what containers mount of them.

A volume is given to a VM when the first container that mounts it is made in the guest, and taken away with
the last: a directory is bound into the VM's share, a file is plugged in as a disk, and neither cares whether
the VM was booted or cloned. So a volume that is added to a running pod is a change of its record, no more.

Two kinds are devices instead, which a VM has from its start: directories by virtio-fs, and all directories of
a guest whose agent does not know the share (it mounts them itself, by their tags).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from vcnode.drivers.base import GuestAgent, Hypervisor, Storage
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnsupportedError
from vcnode.models.node import DriverInfo
from vcnode.models.pod import ContainerSpec, PodSpec
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import VOLUME_DISK, Disk, GuestMount, Share
from vcnode.models.volumes import MAX_TAG_BYTES, Mount, Volume
from vcnode.pods.live import LivePod
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.statuses import container_id

MOUNTS = "mounts"
"""Capability of an agent that can mount volumes in containers."""
SHARE_PREFIX = "volume."
"""Of names in the share. Those of containers have no dot in them."""


def share_name(volume: Volume) -> str:
    """Where the directory is in the VM's share."""
    return f"{SHARE_PREFIX}{volume.mount_tag}"


def disk_id(volume: Volume) -> str:
    """Serial of the disk, which has less room than a tag."""
    return f"{VOLUME_DISK}{_digest(volume.mount_tag)[:16]}"


def device_tag(tag: str) -> str:
    """The tag of a device, which has `MAX_TAG_BYTES` at most: a longer one is cut and made distinct."""
    return tag if len(tag) <= MAX_TAG_BYTES else f"{tag[: MAX_TAG_BYTES - 9]}-{_digest(tag)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def mounted_by(volumes: Iterable[Volume], spec: ContainerSpec) -> tuple[Volume, ...]:
    """Those of the pod's *volumes* that a container mounts."""
    tags = {mount.tag for mount in spec.mounts}
    return tuple(volume for volume in volumes if volume.mount_tag in tags)


def is_device(volume: Volume, agent: DriverInfo) -> bool:
    """Whether the volume is a device that the VM has from its start."""
    return volume.host_path is not None and (volume.needs_boot or MOUNTS not in agent.capabilities)


def guest_mounts(record: PodRecord, spec: ContainerSpec) -> tuple[GuestMount, ...]:
    """What a container mounts, as its guest is told."""
    volumes = {volume.mount_tag: volume for volume in record.volumes}
    return tuple(_guest_mount(mount, volumes[mount.tag] if mount.tag else None) for mount in spec.mounts)


def _guest_mount(mount: Mount, volume: Volume | None) -> GuestMount:
    bare = GuestMount(destination=mount.destination, options=mount.options, path=mount.path)
    if mount.type == "socket":
        return bare.model_copy(update={"port": mount.source, "path": ""})
    if volume is None:
        return bare
    if volume.device is not None:
        of_disk = {"disk_id": disk_id(volume), "fs": volume.fs, "read_only": volume.read_only}
        return bare.model_copy(update=of_disk)
    if volume.needs_boot:
        return bare.model_copy(update={"fs_tag": device_tag(volume.mount_tag)})
    return bare.model_copy(update={"shared_name": share_name(volume)})


# -- checks ------------------------------------------------------------------------------------------------


def check_mounts(volumes: Iterable[Volume], pod: PodSpec, spec: ContainerSpec, where: str) -> None:
    """See that what a container mounts is the pod's. Raises InvalidArgumentError, which names the field."""
    tags = {volume.mount_tag for volume in volumes}
    ports = {socket.name for socket in pod.sockets}
    for number, mount in enumerate(spec.mounts):
        field = f"{where}.mounts[{number}].source"
        if mount.type == "bind" and mount.tag not in tags:
            raise InvalidArgumentError.field(
                field, f"names no volume of the pod; it has {', '.join(sorted(tags)) or 'none'}"
            )
        if mount.type == "socket" and mount.source not in ports:
            raise InvalidArgumentError.field(
                field, f"names no socket of the pod; it has {', '.join(sorted(ports)) or 'none'}"
            )


async def check_volume(
    volume: Volume, field: str, *, pod: PodSpec, hypervisor: Hypervisor, agent: GuestAgent, storage: Storage
) -> None:
    """See that a pod can have a volume.

    Raises:
        InvalidArgumentError, NotFoundError: Its path cannot be used, or its driver not here; names the field.
        UnsupportedError: A driver lacks what it needs.
    """
    if volume.needs_boot:
        if "virtio-fs" not in hypervisor.info.capabilities:
            raise UnsupportedError(
                f"{field}.driver: this node has no virtiofsd; install it, or use 9p.", field=f"{field}.driver"
            )
        if pod.template == "require":
            raise InvalidArgumentError.field(
                f"{field}.driver", "virtio-fs needs a VM that boots, and 'template' is 'require'; use 9p"
            )
    if volume.device is not None and MOUNTS not in agent.info.capabilities:
        raise UnsupportedError(
            f"{field}.device: agent_type {agent.info.type} cannot mount disks.", field=f"{field}.device"
        )
    name = "device" if volume.device is not None else "host_path"
    try:
        if volume.device is not None:
            os.close(await storage.open_file(volume.device, writable=not volume.read_only))
        else:
            await storage.check_rootfs(volume.host_path or "")
    except NotFoundError as exc:
        where = f"{field}.{name}"
        raise NotFoundError(f"{where}: {exc.message}", **{**exc.details, "field": where}) from exc
    except InvalidArgumentError as exc:
        raise InvalidArgumentError.field(f"{field}.{name}", exc.message) from exc


# -- making them reachable ---------------------------------------------------------------------------------


async def shares_at_launch(parts: Parts, record: PodRecord, vm_id: str, shared_dir: str) -> tuple[Share, ...]:
    """Bind the directories that are devices of the VM; the VM's directory takes them along when it goes."""
    found = []
    for volume in record.volumes:
        if is_device(volume, parts.agent(record).info):
            await _share(parts, vm_id, volume)
            found.append(
                Share(
                    tag=device_tag(volume.mount_tag),
                    directory=f"{shared_dir}/{share_name(volume)}",
                    virtio_fs=volume.needs_boot,
                )
            )
    return tuple(found)


async def provide(parts: Parts, live: LivePod, record: PodRecord, container: ContainerRecord) -> None:
    """Give the VM what the container mounts, unless it has it. Undone by `withdraw`, whatever fails.

    Raises:
        InvalidArgumentError, NotFoundError, StorageError, HypervisorError: A volume cannot be had.
    """
    cid = container_id(container)
    for volume in mounted_by(record.volumes, container.spec):
        users = live.volume_users.setdefault(volume.mount_tag, set())
        first = not users
        users.add(cid)
        if not first or is_device(volume, parts.agent(record).info):
            continue
        if volume.device is None:
            await _share(parts, live.vm.record.vm_id, volume)
            continue
        fd = await parts.storage.open_file(volume.device, writable=not volume.read_only)
        try:
            disk = Disk(disk_id=disk_id(volume), path=volume.device, fd=fd, read_only=volume.read_only)
            await live.vm.attach_disk(disk, timeout_s=REQUEST_LIMIT_S)
        except FailedPreconditionError as exc:
            raise FailedPreconditionError(f"Volume {volume.mount_tag}: {exc.message}", **exc.details) from exc
        finally:
            os.close(fd)


async def withdraw(parts: Parts, live: LivePod, record: PodRecord, container: ContainerRecord) -> None:
    """Take away what no other container mounts. Can be repeated."""
    cid = container_id(container)
    for volume in mounted_by(record.volumes, container.spec):
        users = live.volume_users.get(volume.mount_tag, set())
        if cid in users and users == {cid} and not is_device(volume, parts.agent(record).info):
            if volume.device is None:
                await parts.storage.unshare(live.vm.record.vm_id, share_name(volume))
            else:
                await live.vm.detach_disk(disk_id(volume), timeout_s=REQUEST_LIMIT_S)
        users.discard(cid)


def note_mounts(live: LivePod, record: PodRecord, container: ContainerRecord) -> None:
    """A container was found in the guest: it has what it mounts."""
    for volume in mounted_by(record.volumes, container.spec):
        live.volume_users.setdefault(volume.mount_tag, set()).add(container_id(container))


async def _share(parts: Parts, vm_id: str, volume: Volume) -> None:
    path = volume.host_path or ""
    await parts.storage.share(vm_id, share_name(volume), path, read_only=volume.read_only)
