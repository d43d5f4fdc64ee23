"""Commands about pods."""

from __future__ import annotations

from vcnode.handlers.services import Services
from vcnode.models.call import Call
from vcnode.models.commands import (
    PodAttachVolume,
    PodCreate,
    PodDelete,
    PodDeleted,
    PodDetachVolume,
    PodList,
    PodName,
    PodResize,
    PodStatuses,
    PodStop,
    PodStopped,
)
from vcnode.models.console import ConsoleText, PodConsole
from vcnode.models.fleet import Bid, PodBid, PodRelease, PodReleased
from vcnode.models.pod import PodStatus
from vcnode.models.stats import PodStats, PodStatsOf


async def pod_create(node: Services, call: Call, request: PodCreate) -> PodStatus:
    """``pod.create``."""
    return await node.pods.create(request.pod, call, reservation=request.reservation)


async def pod_start(node: Services, call: Call, request: PodName) -> PodStatus:
    """``pod.start``."""
    return await node.pods.start(request.pod_id, call)


async def pod_run(node: Services, call: Call, request: PodCreate) -> PodStatus:
    """``pod.run``."""
    return await node.pods.run(request.pod, call, reservation=request.reservation)


async def pod_stop(node: Services, call: Call, request: PodStop) -> PodStopped:
    """``pod.stop``."""
    return await node.pods.stop(request.pod_id, request.grace_s, call)


async def pod_pause(node: Services, call: Call, request: PodName) -> PodStatus:
    """``pod.pause``."""
    return await node.pods.pause(request.pod_id, call)


async def pod_resume(node: Services, call: Call, request: PodName) -> PodStatus:
    """``pod.resume``."""
    return await node.pods.resume(request.pod_id, call)


async def pod_resize(node: Services, call: Call, request: PodResize) -> PodStatus:
    """``pod.resize``."""
    return await node.pods.resize(request.pod_id, request.mem_size_mib, call)


async def pod_attach_volume(node: Services, call: Call, request: PodAttachVolume) -> PodStatus:
    """``pod.attach_volume``."""
    return await node.pods.attach_volume(request.pod_id, request.volume, call)


async def pod_detach_volume(node: Services, call: Call, request: PodDetachVolume) -> PodStatus:
    """``pod.detach_volume``."""
    return await node.pods.detach_volume(request.pod_id, request.mount_tag, call)


async def pod_delete(node: Services, call: Call, request: PodDelete) -> PodDeleted:
    """``pod.delete``."""
    return await node.pods.delete(request.pod_id, request.force, call)


def pod_list(node: Services, call: Call, request: PodList) -> PodStatuses:
    """``pod.list``."""
    return node.pods.list(request.labels, request.states, request.annotations)


def pod_status(node: Services, call: Call, request: PodName) -> PodStatus:
    """``pod.status``."""
    return node.pods.status(request.pod_id)


async def pod_stats(node: Services, call: Call, request: PodStatsOf) -> PodStats:
    """``pod.stats``."""
    return await node.pods.stats(request, call)


async def pod_console(node: Services, call: Call, request: PodConsole) -> ConsoleText:
    """``pod.console``."""
    return await node.pods.console(request.pod_id, request.max_bytes, call)


def pod_bid(node: Services, call: Call, request: PodBid) -> Bid:
    """``pod.bid``."""
    return node.fleet.bid(request)


def pod_release(node: Services, call: Call, request: PodRelease) -> PodReleased:
    """``pod.release``."""
    return node.fleet.release(request.reservation)
