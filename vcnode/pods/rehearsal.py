"""What a spare VM does before it waits: once, all that the start of a pod will ask of its guest.

The first time is slow: without KVM, QEMU translates what the guest runs, and with it the guest still faults
in what it has never touched. A spare has that behind it, so that a pod finds its guest warm.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable
from datetime import datetime

from vcnode.aio import deadline_as
from vcnode.drivers.base import ContainerExited, GuestSession, Vm
from vcnode.errors import DeadlineExceededError, UnavailableError, VcnodeError
from vcnode.models.vm import ContainerRoot, Disk, GuestConfig, GuestContainer, GuestProcess
from vcnode.pods.images import ImageService
from vcnode.pods.process import DEFAULT_CAPABILITIES

log = logging.getLogger(__name__)

LIMIT_S = 20.0
"""Seconds for all of it, which takes some tenths of one."""
CONTAINER_ID = "rehearsal"
DISK_ID = "d-rehearsal"
HOSTNAME = "spare"
PROGRAM = "/vcnode-rehearsal"
"""There is none: the guest goes all the way to the execution of a program, and nothing of an image runs."""


class Rehearsal:
    """Lets guests rehearse, with the image that was used last.

    Args:
        images: What this node has.
        clock: The current time, with its zone.
    """

    def __init__(self, images: ImageService, clock: Callable[[], datetime]) -> None:
        self._images = images
        self._clock = clock
        self._unfit: set[str] = set()
        """Digests of images with which it did not go well."""

    async def run(self, vm: Vm, session: GuestSession) -> None:
        """Rehearse in a fresh guest; nothing of it is left there but what is warm now.

        Raises:
            UnavailableError: It did not go well: end this VM. The next one will not try the same.
        """
        image = next((i for i in self._images.recent() if i.digest not in self._unfit), None)
        if image is None:
            return
        late = DeadlineExceededError(f"The rehearsal in VM {vm.record.vm_id} took longer than {LIMIT_S:g} s.")
        try:
            async with deadline_as(LIMIT_S, lambda: late):
                await self._run(vm, session, image.name)
        except VcnodeError as exc:
            self._unfit.add(image.digest)
            log.warning("The rehearsal with image %s went wrong", image.name, exc_info=exc)
            raise UnavailableError(f"The rehearsal in VM {vm.record.vm_id} went wrong.") from exc

    async def _run(self, vm: Vm, session: GuestSession, image_name: str) -> None:
        config = GuestConfig(
            hostname=HOSTNAME,
            time_ns=int(self._clock().timestamp() * 1_000_000) * 1000,
            entropy=os.urandom(64),
            machine_id=uuid.UUID(vm.record.uuid).hex,
        )
        file, _ = await self._images.resolve(image_name, is_use=False)
        container = GuestContainer(
            container_id=CONTAINER_ID,
            root=ContainerRoot(disk_id=DISK_ID),
            hostname=HOSTNAME,
            process=GuestProcess(args=(PROGRAM,), capabilities=DEFAULT_CAPABILITIES),
        )
        await session.configure(config, timeout_s=LIMIT_S)
        await vm.attach_disk(Disk(disk_id=DISK_ID, path=str(file.path)), timeout_s=LIMIT_S)
        await session.create_container(container, timeout_s=LIMIT_S)
        await session.start_container(CONTAINER_ID, timeout_s=LIMIT_S)
        async with contextlib.aclosing(session.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, ContainerExited) and event.container_id == CONTAINER_ID:
                    break
        await session.delete_container(CONTAINER_ID, timeout_s=LIMIT_S)
        await vm.detach_disk(DISK_ID, timeout_s=LIMIT_S)
