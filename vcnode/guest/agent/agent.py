"""The agent's process: everything put together, and served until the guest ends."""

from __future__ import annotations

import gc
import json
import os

from vcnode.guest.agent import cgroups, devices, limits, port
from vcnode.guest.agent.containers import Container, Containers
from vcnode.guest.agent.dialing import Dialer
from vcnode.guest.agent.disks import Disks
from vcnode.guest.agent.execs import Execs
from vcnode.guest.agent.logs import Feed
from vcnode.guest.agent.loop import Loop
from vcnode.guest.agent.mainio import Attachments
from vcnode.guest.agent.mounts import Mounts
from vcnode.guest.agent.service import Service
from vcnode.guest.agent.spawn import Spawner
from vcnode.guest.agent.watchdog import Watchdog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IMAGE_FILE = "/etc/vcnode/image.json"
GOODBYE_S = 0.2
"""How long the reply to ``shutdown`` may take to leave before the guest ends all the same."""


def introduction(image_file: str = IMAGE_FILE) -> dict[str, str]:
    """What the agent says of itself in its hello.

    The boot id comes with ``configure``: the kernel makes it up when it is first read, and all clones of a
    template in which it was read would share it.
    """
    with open(image_file, encoding="utf-8") as file:
        image = json.load(file)
    return {
        "agent_version": str(image["agent_version"]),
        "boot_id": "",
        "kernel": os.uname().release,
    }


class Agent:
    """One agent on one open port.

    Args:
        port_fd: The port, non-blocking; the caller keeps it.
        introduction: See the function of this name.
        power_off: Called once when the host has asked for shutdown, with its reply sent.
        guard_oom: Whether the kernel is to take containers and not the agent where memory is short.
        mounts: Where roots are prepared.
        cgroup_root: Where cgroup v2 is mounted; `cgroups.set_up` was called for it.
    """

    def __init__(
        self,
        port_fd: int,
        introduction: dict[str, str],
        power_off: Callable[[], None],
        *,
        guard_oom: bool = True,
        mounts: Mounts | None = None,
        cgroup_root: str = cgroups.ROOT,
    ) -> None:
        self.loop = Loop()
        self._power_off = power_off
        spawner = Spawner(guard_oom=guard_oom)
        self._port = port.Port(self.loop, port_fd, introduction)
        mounts = mounts or Mounts()
        feed = Feed(self._port)
        disks = Disks(self.loop, f"{mounts.run}/disks")
        self.containers = Containers(
            self.loop,
            mounts,
            disks,
            spawner,
            feed,
            self._container_exited,
            cgroup_root,
            health_changed=self._health_changed,
        )
        execs = Execs(self.loop, self._port, spawner)
        dialer = Dialer(self.loop, self._port)
        attachments = Attachments(self.loop, self._port, execs.new_id)
        self._ending = False
        self._service = Service(
            self.loop,
            self._port,
            self.containers,
            execs,
            dialer,
            attachments,
            feed,
            introduction,
            self._shut_down,
            Watchdog(self.loop, self._end_by_itself),
        )
        self._port.listener = self._service

    def _container_exited(self, container: Container) -> None:
        self._service.container_exited(container)
        if self._ending and not self.containers.any_runs:
            self.loop.stop()

    def _health_changed(self, container: Container) -> None:
        self._service.health_changed(container)

    def _shut_down(self) -> None:
        self.containers.kill_all()
        self._port.when_sent(self.loop.stop, timeout_s=GOODBYE_S)

    def _end_by_itself(self, grace_s: float) -> None:
        """The host wants no more of this guest than silence: end the containers, with their grace, and it."""
        print("vcnode-agent: nothing was heard from the host for too long; powering off", flush=True)
        self._ending = True
        self.containers.end_all(grace_s)
        self.loop.call_later(grace_s + GOODBYE_S, self.loop.stop)
        if not self.containers.any_runs:
            self.loop.stop()

    def serve(self) -> None:
        """Serve until the host asks for shutdown, then call *power_off*."""
        self._port.open()
        # What is here now stays for ever: do not look through it again, nor touch its pages in each child.
        gc.collect()
        gc.freeze()
        self.loop.run()
        self._power_off()


def main(power_off: Callable[[], None]) -> None:
    """Run the agent in a guest that `init` has set up. Returns after `power_off`; raises what went wrong."""
    limits.raise_own()
    cgroups.set_up()
    devices.restrict(f"{cgroups.ROOT}/{cgroups.PARENT}")
    port_fd = os.open(port.wait_for(), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    Agent(port_fd, introduction(), power_off).serve()
