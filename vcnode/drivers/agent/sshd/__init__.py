"""The agent driver for guests that run an SSH server and nothing of vcnode's."""

from vcnode.drivers.agent.sshd.agent import SshdAgent

__all__ = ["SshdAgent"]
