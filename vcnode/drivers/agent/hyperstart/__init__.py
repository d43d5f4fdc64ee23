"""The agent of guests that run hyperstart, as virtcontainers had it.

`agent` opens a `session` over two `link`s; `wire` is the protocol without I/O, `messages` what is said in it.
"""

from vcnode.drivers.agent.hyperstart.agent import HyperstartAgent

__all__ = ["HyperstartAgent"]
