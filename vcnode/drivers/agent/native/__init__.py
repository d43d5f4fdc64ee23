"""The driver of our own guest agent (contracts/guest-protocol.md).

`agent` opens sessions, `link` moves bytes between socket and codec, `session` matches replies to calls,
`process` is one process with its streams, `messages` builds params and checks whatever comes back.
"""

from vcnode.drivers.agent.native.agent import NativeAgent

__all__ = ["NativeAgent"]
