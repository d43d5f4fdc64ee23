"""Commands that run a program inside a pod."""

from __future__ import annotations

from vcnode.handlers.services import Services
from vcnode.models.call import Call
from vcnode.models.commands import ContainerExec, PodExec
from vcnode.models.pod import ExecResult


async def pod_exec(node: Services, call: Call, request: PodExec) -> ExecResult:
    """``pod.exec``."""
    return await node.pods.exec(request.pod_id, None, request, call)


async def container_exec(node: Services, call: Call, request: ContainerExec) -> ExecResult:
    """``container.exec``."""
    return await node.pods.exec(request.pod_id, request.container_id, request, call)
