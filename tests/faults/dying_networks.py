"""Processes that are killed before a chosen side effect, while they make or remove a pod's network.

Run as a program in a network of the test's own::

    python -m tests.faults.dying_networks bridge MARK DIRECTORY

For each side effect of a set-up, and then of a tear-down, a child is forked that dies just before it:
messages to the kernel, records on the disk, and plugins, there also just after they have begun. A new driver,
which knows no more than the VM's id and what is on the disk, removes what is there. Prints one line for each
death.
Without nftables, which has no steps in between: each change of it is one transaction of a program of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyroute2.netlink.core import NoClose

from vcnode.drivers import namespaces
from vcnode.drivers.base import Network
from vcnode.drivers.network.bridge import BridgeNetwork
from vcnode.drivers.network.cni import CniNetwork
from vcnode.drivers.network.kept import Kept
from vcnode.models.network import NetworkConfig, NetworkModel, RateMbit
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import BridgeSettings, CniSettings

LIMIT_S = 30.0
RATE = RateMbit(ingress=10, egress=10)
PR_SET_CHILD_SUBREAPER = 36


class Bridge:
    """The bridge driver on a named network, which has a bridge of its own."""

    model = NetworkModel.BRIDGE
    config = NetworkConfig(networks=("blue",), rate_mbit=RATE)

    def __init__(self, mark: str, directory: Path) -> None:
        self._mark = mark

    def driver(self) -> Network:
        """As a node agent that has just started has it, but for its look around the host."""
        made = BridgeNetwork(BridgeSettings(), self._mark, None)
        made._unusable = None
        return made

    def left(self) -> list[str]:
        """What nobody may have left, besides what the driver knows."""
        return []


class Cni:
    """The CNI driver with the plugins bridge and host-local."""

    model = NetworkModel.CNI
    config = NetworkConfig()

    def __init__(self, mark: str, directory: Path) -> None:
        self._directory = directory
        (directory / "net.d").mkdir()
        local = {"type": "host-local", "dataDir": str(directory / "leases"), "subnet": "10.77.1.0/24"}
        bridge = {"type": "bridge", "bridge": "cni1", "ipam": local}
        conf = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}
        (directory / "net.d" / "pods.conflist").write_text(json.dumps(conf))

    def driver(self) -> Network:
        """As a node agent that has just started has it."""
        made = CniNetwork(CniSettings(conf_dir=self._directory / "net.d"), self._directory)
        asyncio.run(made.open())
        return made

    def left(self) -> list[str]:
        """Addresses that are taken, and records."""
        leases = [str(path) for path in self._directory.glob("leases/*/10.*")]
        return leases + [str(path) for path in self._directory.glob("cni/*")]


def die_before(number: int) -> None:
    """Let this process end before its *number*-th side effect."""
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            count()
            return act(*arguments)

        return counted

    for owner, name in ((NoClose, "send"), (NoClose, "sendto"), (Kept, "save"), (Kept, "remove")):
        setattr(owner, name, dying(getattr(owner, name)))
    execute = asyncio.create_subprocess_exec

    async def executed(*arguments: Any, **options: Any) -> Any:
        count()
        process = await execute(*arguments, **options)
        count()
        return process

    asyncio.create_subprocess_exec = executed


def forked(work: Callable[[], None], number: int) -> bool:
    """Whether a child that dies before side effect *number* of its work was done before that.

    All that it has started has ended: the node agent takes longer to start than a plugin's helpers need.
    """
    pid = os.fork()
    if pid == 0:
        try:
            die_before(number)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    if os.WIFSIGNALED(status):
        return False
    assert status == 0
    return True


def main(kind: str, mark: str, directory: Path) -> None:
    """See the module."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    site = {"bridge": Bridge, "cni": Cni}[kind](mark, directory)
    vm_id = f"{mark}0000001"
    planned = site.driver().plan(NetworkRequest(pod_id="p", vm_id=vm_id, config=site.config), ())

    def attach() -> None:
        asyncio.run(site.driver().attach(planned, timeout_s=LIMIT_S))

    def detach() -> None:
        asyncio.run(site.driver().detach(planned, timeout_s=LIMIT_S))

    async def clean(driver: Any) -> None:
        """What recovery or the audit does, and what must be left then."""
        await driver.detach(NetworkAttachment(model=site.model, vm_id=vm_id), timeout_s=LIMIT_S)
        await driver.close()  # which takes bridges away that nobody uses
        assert await driver.held(mark) == []
        assert namespaces.names(mark) == []
        assert site.left() == []

    number = 1
    while not forked(attach, number):
        asyncio.run(clean(site.driver()))
        print("set-up", number, flush=True)
        number += 1
    number = 1
    while not forked(detach, number):
        asyncio.run(clean(site.driver()))
        print("tear-down", number, flush=True)
        attach()
        number += 1
    asyncio.run(clean(site.driver()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
