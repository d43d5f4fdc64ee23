"""The agent driver for guests that have none: a VM is started and stopped, and nothing is asked of it."""

from __future__ import annotations

import vcnode
from vcnode.drivers.agent.refusing import RefusingSession
from vcnode.drivers.base import PLAIN_ACCESS, AgentAccess, GuestSession, Vm
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, AgentType
from vcnode.models.vm import AGENT_CHANNELS, SHARE_TAG, Channel


class NoopAgent:
    """The `GuestAgent` without capabilities; ``connect`` succeeds at once, whatever runs in the VM."""

    @property
    def info(self) -> DriverInfo:
        """See `GuestAgent.info`: no capabilities."""
        return DriverInfo(type=AgentType.NOOP, version=vcnode.__version__)

    @property
    def share_tag(self) -> str:
        """See `GuestAgent.share_tag`."""
        return SHARE_TAG

    def channels(self, config: AgentConfig) -> tuple[Channel, ...]:
        """See `GuestAgent.channels`: that of the native agent, which is what the node's own guest expects."""
        return AGENT_CHANNELS

    async def connect(self, vm: Vm, *, access: AgentAccess = PLAIN_ACCESS, timeout_s: float) -> GuestSession:
        """See `GuestAgent.connect`."""
        return RefusingSession(AgentType.NOOP)
