"""Processes that are killed before a chosen message to the kernel, while they make or remove a pod's network.

Run as a program in a network of the test's own::

    python -m tests.faults.dying_networks MARK

For each message of a set-up, and then of a tear-down, a child is forked that dies just before it; a new
driver, which knows no more than the VM's id, removes what is there. Prints one line for each death. Without
nftables, which has no messages in between: each change of it is one transaction of a program of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pyroute2.netlink.core import NoClose

from vcnode.drivers import namespaces
from vcnode.drivers.network.bridge import BridgeNetwork
from vcnode.models.network import NetworkConfig, NetworkModel, RateMbit
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import BridgeSettings

LIMIT_S = 30.0
CONFIG = NetworkConfig(networks=("blue",), rate_mbit=RateMbit(ingress=10, egress=10))


def network(mark: str) -> BridgeNetwork:
    """A driver as a node agent that has just started has it, but for its look around the host."""
    made = BridgeNetwork(BridgeSettings(), mark, None)
    made._unusable = None
    return made


def die_before(number: int) -> None:
    """Let this process end before its *number*-th message to the kernel."""
    left = [number]

    def dying(send: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return send(*arguments)

        return act

    for name in ("send", "sendto"):
        setattr(NoClose, name, dying(getattr(NoClose, name)))


def forked(work: Callable[[], None], number: int) -> bool:
    """Whether a child that dies before message *number* of its work was done before that."""
    pid = os.fork()
    if pid == 0:
        try:
            die_before(number)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert status == 0
    return True


async def clean(mark: str, vm_id: str) -> None:
    """What recovery or the audit does, and what must be left then."""
    driver = network(mark)
    await driver.detach(NetworkAttachment(model=NetworkModel.BRIDGE, vm_id=vm_id), timeout_s=LIMIT_S)
    await driver.close()  # which takes bridges away that nobody uses
    assert await driver.held(mark) == []
    assert namespaces.names(mark) == []


def main(mark: str) -> None:
    """See the module."""
    vm_id = f"{mark}0000001"
    planned = network(mark).plan(NetworkRequest(pod_id="p", vm_id=vm_id, config=CONFIG), ())

    def attach() -> None:
        asyncio.run(network(mark).attach(planned, timeout_s=LIMIT_S))

    def detach() -> None:
        asyncio.run(network(mark).detach(planned, timeout_s=LIMIT_S))

    number = 1
    while not forked(attach, number):
        asyncio.run(clean(mark, vm_id))
        print("set-up", number, flush=True)
        number += 1
    number = 1
    while not forked(detach, number):
        asyncio.run(clean(mark, vm_id))
        print("tear-down", number, flush=True)
        attach()
        number += 1
    asyncio.run(clean(mark, vm_id))


if __name__ == "__main__":
    main(sys.argv[1])
