"""Whether a pod shares directories of its host: its VM's process then needs rights on it. Pure."""

from __future__ import annotations

from vcnode.errors import FailedPreconditionError
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import VmRecord


def shares_host_dirs(record: PodRecord) -> bool:
    """Whether a container of the pod has a directory of the host for its root."""
    return any(container.spec.rootfs is not None for container in record.containers)


def check_can_share(vm: VmRecord, container: ContainerRecord, pod_id: str) -> None:
    """See that a container's root can be given to a VM that runs.

    Raises:
        FailedPreconditionError: Its process has a user of its own, which may not open the host's files.
    """
    if vm.uid is not None and container.spec.rootfs is not None:
        raise FailedPreconditionError(
            f"Pod {pod_id} was started without directories of the host (qemu.uid_base); stop and start it, "
            f"then its container {container.spec.id} can have {container.spec.rootfs}.",
            pod_id=pod_id,
        )
