"""A pod's VM while it runs, as this process holds it; everything here is lost with the process."""

from __future__ import annotations

import asyncio

from vcnode import aio
from vcnode.drivers.base import ContainerExited, ContainerHealth, GuestSession, Vm
from vcnode.errors import AgentError, FailedPreconditionError
from vcnode.models.vm import ContainerRoot, VmExit


class LivePod:
    """Handles and notes of one running VM.

    Made when the VM is launched or found again; in ``Parts.live`` until its end.
    """

    def __init__(self, pod_id: str, vm: Vm) -> None:
        self.pod_id = pod_id
        self.vm = vm
        self.session: GuestSession | None = None
        """None until the agent has answered, and while the session is being restored."""
        self.exit: VmExit | None = None
        """How the VM ended, once it has."""
        self.gone = asyncio.Event()
        """Set with `exit`."""
        self.paused = False
        """Its vCPUs are stopped, or just about to be: the guest answers nothing, and that is no news."""
        self.restoring = False
        """Somebody tries to get a lost session back."""
        self.ending = False
        """Somebody ends the VM on purpose: its end and that of its session are no news."""
        self.start_section: aio.Interruptible | None = None
        """While the pod starts: to be interrupted when the VM ends or the session is lost."""
        self.provided: dict[str, ContainerRoot] = {}
        """Containers that exist in the guest, with their roots."""
        self.volume_users: dict[str, set[str]] = {}
        """Containers that exist in the guest, by the tags of the volumes that they mount."""
        self.plugged: set[str] = set()
        """Disks of images that this process has plugged in."""
        self.starting: set[str] = set()
        """Containers whose start is under way and not yet recorded."""
        self.early_exits: dict[str, ContainerExited] = {}
        """Exits of those, to be recorded after their starts."""
        self.early_health: dict[str, ContainerHealth] = {}
        """What their probes said last, before that."""
        self.unsaved_exits: set[str] = set()
        """Containers whose end was seen, but could not be recorded yet."""
        self.tasks: set[asyncio.Task[None]] = set()
        """Those that watch this VM."""
        self._exits: dict[str, asyncio.Event] = {}

    def require_session(self) -> GuestSession:
        """The session with the guest.

        Raises:
            AgentError: There is none now.
        """
        if self.session is None:
            raise AgentError(f"The guest of pod {self.pod_id} cannot be reached now; try again.")
        return self.session

    def exit_event(self, container_id: str) -> asyncio.Event:
        """Set once the end of the container's main process is recorded (or cannot be), or the VM is gone."""
        event = self._exits.setdefault(container_id, asyncio.Event())
        if self.gone.is_set():
            event.set()
        return event

    def container_starts(self, container_id: str) -> None:
        """Note that a container is about to run."""
        self.starting.add(container_id)
        self.early_exits.pop(container_id, None)
        self.early_health.pop(container_id, None)
        self._exits[container_id] = asyncio.Event()

    def container_did_not_start(self, container_id: str) -> None:
        """Note that a container's start was taken back."""
        self.starting.discard(container_id)
        self.early_exits.pop(container_id, None)
        self.early_health.pop(container_id, None)

    def container_ended(self, container_id: str) -> None:
        """Wake whoever waits for the container's end."""
        self.exit_event(container_id).set()

    def vm_ended(self, exit_: VmExit) -> None:
        """Note how the VM ended and wake whoever waits for it or for a container."""
        self.exit = exit_
        self.gone.set()
        for event in self._exits.values():
            event.set()

    def disk_in_use(self, disk_id: str, *, besides: str) -> bool:
        """Whether a container other than *besides* has its root on that disk."""
        return any(root.disk_id == disk_id for cid, root in self.provided.items() if cid != besides)

    async def stop_watching(self) -> None:
        """Cancel the tasks that watch and wait for them; must not be awaited by one of them."""
        tasks = set(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def close_session(self) -> None:
        """End the session, if there is one; the guest goes on."""
        session, self.session = self.session, None
        if session is not None:
            await session.close()


def require_live(live: dict[str, LivePod], pod_id: str, state: str, verb: str) -> LivePod:
    """The running VM of a pod.

    Raises:
        FailedPreconditionError: It has none.
    """
    found = live.get(pod_id)
    if found is None or found.ending or found.gone.is_set():
        raise FailedPreconditionError(
            f"The VM of pod {pod_id} is ending or gone; {verb} needs it to run.", state=state
        )
    return found
