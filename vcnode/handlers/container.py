"""Commands about containers."""

from __future__ import annotations

from vcnode.handlers.services import Services
from vcnode.models.call import Call
from vcnode.models.commands import (
    ContainerCreate,
    ContainerDelete,
    ContainerDeleted,
    ContainerKill,
    ContainerList,
    ContainerName,
    ContainerStatuses,
    ContainerStop,
    ContainerUpdate,
)
from vcnode.models.living import (
    ContainerProcesses,
    ContainerProcessesOf,
    ContainerWait,
    ContainerWaited,
)
from vcnode.models.logs import ContainerLogEntries, ContainerLogs
from vcnode.models.pod import ContainerStatus


async def container_create(node: Services, call: Call, request: ContainerCreate) -> ContainerStatus:
    """``container.create``."""
    return await node.pods.create_container(request.pod_id, request.container, call)


async def container_start(node: Services, call: Call, request: ContainerName) -> ContainerStatus:
    """``container.start``."""
    return await node.pods.start_container(request.pod_id, request.container_id, call)


async def container_stop(node: Services, call: Call, request: ContainerStop) -> ContainerStatus:
    """``container.stop``."""
    return await node.pods.stop_container(request.pod_id, request.container_id, request.grace_s, call)


async def container_kill(node: Services, call: Call, request: ContainerKill) -> ContainerStatus:
    """``container.kill``."""
    return await node.pods.kill_container(
        request.pod_id, request.container_id, request.signal, request.all, call
    )


async def container_delete(node: Services, call: Call, request: ContainerDelete) -> ContainerDeleted:
    """``container.delete``."""
    return await node.pods.delete_container(request.pod_id, request.container_id, request.force, call)


def container_list(node: Services, call: Call, request: ContainerList) -> ContainerStatuses:
    """``container.list``."""
    return node.pods.list_containers(request.pod_id, request.states, request.labels, request.annotations)


def container_status(node: Services, call: Call, request: ContainerName) -> ContainerStatus:
    """``container.status``."""
    return node.pods.container_status(request.pod_id, request.container_id)


async def container_pause(node: Services, call: Call, request: ContainerName) -> ContainerStatus:
    """``container.pause``."""
    return await node.pods.pause_container(request.pod_id, request.container_id, call)


async def container_resume(node: Services, call: Call, request: ContainerName) -> ContainerStatus:
    """``container.resume``."""
    return await node.pods.resume_container(request.pod_id, request.container_id, call)


async def container_update(node: Services, call: Call, request: ContainerUpdate) -> ContainerStatus:
    """``container.update``."""
    return await node.pods.update_container(request.pod_id, request.container_id, request.resources, call)


async def container_wait(node: Services, call: Call, request: ContainerWait) -> ContainerWaited:
    """``container.wait``."""
    return await node.pods.wait_container(request.pod_id, request.container_id, request.condition)


async def container_processes(
    node: Services, call: Call, request: ContainerProcessesOf
) -> ContainerProcesses:
    """``container.processes``."""
    return await node.pods.processes(request.pod_id, request.container_id, request.limit, call)


async def container_logs(node: Services, call: Call, request: ContainerLogs) -> ContainerLogEntries:
    """``container.logs``."""
    return await node.pods.container_logs(request)
