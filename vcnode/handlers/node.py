"""Commands about the node itself."""

from __future__ import annotations

from vcnode.handlers.services import Services
from vcnode.models.call import Call
from vcnode.models.commands import Audit, Empty
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
