"""Commands that open sessions, and those about sessions."""

from __future__ import annotations

from vcnode.handlers.services import Services
from vcnode.models.call import Call
from vcnode.models.sessions import (
    ContainerAttach,
    ContainerCopyIn,
    ContainerCopyOut,
    PodForward,
    Session,
    SessionClosed,
    SessionExec,
    SessionList,
    SessionName,
    SessionResume,
    Sessions,
)


async def session_exec(node: Services, call: Call, request: SessionExec) -> Session:
    """``session.exec``."""
    return await node.streams.exec(request, call)


async def session_resume(node: Services, call: Call, request: SessionResume) -> Session:
    """``session.resume``."""
    return node.sessions.resume(request.session_id)


async def session_close(node: Services, call: Call, request: SessionName) -> SessionClosed:
    """``session.close``."""
    return node.sessions.close(request.session_id)


def session_list(node: Services, call: Call, request: SessionList) -> Sessions:
    """``session.list``."""
    return node.sessions.list(request.pod_id)


async def container_copy_in(node: Services, call: Call, request: ContainerCopyIn) -> Session:
    """``container.copy_in``."""
    return await node.streams.copy_in(request, call)


async def container_copy_out(node: Services, call: Call, request: ContainerCopyOut) -> Session:
    """``container.copy_out``."""
    return await node.streams.copy_out(request, call)


async def pod_forward(node: Services, call: Call, request: PodForward) -> Session:
    """``pod.forward``."""
    return await node.streams.forward(request, call)


async def container_attach(node: Services, call: Call, request: ContainerAttach) -> Session:
    """``container.attach``."""
    return await node.streams.attach(request, call)
