"""A guest agent that only pretends, for nodes with the mock hypervisor (docs/mock.md).

`shell` knows what the few understood commands do, `guest` is the simulated guest, `agent` opens sessions.
"""

from vcnode.drivers.agent.mock.agent import MockAgent
from vcnode.drivers.agent.mock.guest import MockGuests

__all__ = ["MockAgent", "MockGuests"]
