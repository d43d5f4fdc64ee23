"""Records as callers see them. Pure."""

from __future__ import annotations

from vcnode.models.pod import (
    ContainerState,
    ContainerStatus,
    HypervisorStatus,
    PodState,
    PodStatus,
)
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import VmRecord


def hostname_of(record: PodRecord) -> str:
    """Hostname in the guest: as asked for, else made of the pod's id."""
    return record.spec.hostname or record.pod_id.replace("_", "-")[:63].rstrip("-")


def pod_status(record: PodRecord, *, node: str, mock: bool) -> PodStatus:
    """The status of a pod; *mock*: its hypervisor only pretends."""
    attachment = record.network
    return PodStatus(
        pod_id=record.pod_id,
        node=node,
        state=record.state,
        reason=record.reason,
        ready=record.state is PodState.RUNNING and all(_is_ready(c) for c in record.containers),
        restart_count=record.restarts.count,
        restart_at=record.restarts.at,
        revision=record.revision,
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        hostname=hostname_of(record),
        resources=record.spec.resources,
        mem_size_mib=record.mem_size_mib,
        hypervisor=None if record.vm is None else _hypervisor_status(record.vm, mock=mock),
        agent_type=record.agent_type,
        network_model=record.network_model,
        network=None if attachment is None else attachment.namespace,
        containers=tuple(container_status(record.pod_id, c) for c in record.containers),
        on_disconnect=record.spec.on_disconnect,
        volumes=record.volumes,
        sockets=record.spec.sockets,
        leftovers=record.leftovers,
        phases_ms=record.phases_ms,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        mock=mock,
    )


def container_status(pod_id: str, record: ContainerRecord) -> ContainerStatus:
    """The status of a container of pod *pod_id*."""
    spec = record.spec
    return ContainerStatus(
        pod_id=pod_id,
        container_id=container_id(record),
        state=record.state,
        ready=_is_ready(record),
        pid=record.pid,
        exit_code=record.exit_code,
        oom_killed=record.oom_killed,
        reason=record.reason,
        restart_count=record.restarts.count,
        restart_at=record.restarts.at,
        rootfs=spec.rootfs,
        image=spec.image,
        image_digest=record.image_digest,
        disk_size_mib=spec.wanted_disk_mib or None,
        mounts=spec.mounts,
        resources=record.limits,
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        labels=spec.labels,
        annotations=spec.annotations,
    )


def _is_ready(record: ContainerRecord) -> bool:
    return record.ready and record.state is ContainerState.RUNNING


def container_id(record: ContainerRecord) -> str:
    """The id of a container; in a record it is always set."""
    if record.spec.id is None:
        raise ValueError("a container record without an id")
    return record.spec.id


def _hypervisor_status(vm: VmRecord, *, mock: bool) -> HypervisorStatus:
    return HypervisorStatus(
        type=vm.type, vm_id=vm.vm_id, pid=vm.pid, uuid=vm.uuid, accelerator=vm.accelerator, mock=mock
    )
