"""Whether a pod shares directories of its host: its VM's process then needs rights on it. Pure."""

from __future__ import annotations

from vcnode.errors import FailedPreconditionError
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import VmRecord
from vcnode.pods.volumes import mounted_by


def shares_host_dirs(record: PodRecord) -> bool:
    """Whether a container of the pod has a directory of the host for its root, or the pod one as a volume."""
    return any(container.spec.rootfs is not None for container in record.containers) or any(
        volume.host_path is not None for volume in record.volumes
    )


def check_can_share(vm: VmRecord, container: ContainerRecord, record: PodRecord) -> None:
    """See that a container's root, and what it mounts, can be given to a VM that runs.

    Raises:
        FailedPreconditionError: Its process has a user of its own, which may not open the host's files.
    """
    paths = [container.spec.rootfs, *(v.host_path for v in mounted_by(record.volumes, container.spec))]
    if vm.uid is not None and (found := next((path for path in paths if path is not None), None)):
        raise FailedPreconditionError(
            f"Pod {record.pod_id} was started without directories of the host (qemu.uid_base); stop and "
            f"start it, then its container {container.spec.id} can have {found}.",
            pod_id=record.pod_id,
        )
