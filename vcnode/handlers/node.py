"""Commands about the node itself."""

from __future__ import annotations

from vcnode.handlers.services import Services
from vcnode.models.call import Call
from vcnode.models.commands import Audit, Empty
from vcnode.models.fleet import DrainReport, NodeCordon, NodeDrain, NodeLabel, NodeStanding
from vcnode.models.node import NodeAudit, NodeInfo, NodePing


def node_info(node: Services, call: Call, request: Empty) -> NodeInfo:
    """``node.info``."""
    return node.node.info()


def node_ping(node: Services, call: Call, request: Empty) -> NodePing:
    """``node.ping``."""
    return node.node.ping()


async def node_audit(node: Services, call: Call, request: Audit) -> NodeAudit:
    """``node.audit``."""
    return await node.pods.audit(repair=request.repair)


async def node_label(node: Services, call: Call, request: NodeLabel) -> NodeStanding:
    """``node.label``."""
    return await node.fleet.label(request)


async def node_cordon(node: Services, call: Call, request: NodeCordon) -> NodeStanding:
    """``node.cordon``."""
    return await node.fleet.cordon(request.reason)


async def node_uncordon(node: Services, call: Call, request: Empty) -> NodeStanding:
    """``node.uncordon``."""
    return await node.fleet.uncordon()


async def node_drain(node: Services, call: Call, request: NodeDrain) -> DrainReport:
    """``node.drain``."""
    return await node.fleet.drain(
        timeout_s=request.timeout_s, delete=request.delete, reason=request.reason, call=call
    )
