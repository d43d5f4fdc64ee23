"""What a guest does once before it is saved as a template, and again in a spare VM before that waits.

The first time of anything is slow: the guest allocates what it keeps, Python adapts its code to what it
meets, and without KVM QEMU translates what runs. What a template has behind it, all its clones share as
memory; what a spare has behind it, the pod that takes it finds warm.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable
from datetime import datetime

from vcnode.aio import deadline_as
from vcnode.drivers.base import ContainerExited, GuestSession, ImageFile, Storage, Vm
from vcnode.errors import DeadlineExceededError, UnavailableError, VcnodeError
from vcnode.models.capabilities import DEFAULT_CAPABILITIES
from vcnode.models.vm import (
    SLOT_DISK,
    ContainerRoot,
    Disk,
    GuestConfig,
    GuestContainer,
    GuestProcess,
    SlotImage,
)

log = logging.getLogger(__name__)

LIMIT_S = 30.0
"""Seconds for all of it, which takes some tenths of one."""
CONTAINER_ID = "rehearsal"
DISK_ID = "d-rehearsal"
HOSTNAME = "spare"
PROGRAM = "/rehearsal"
"""There is none: the guest goes all the way to the execution of a program, and ends with 127 there."""


class Rehearsal:
    """Lets guests rehearse the start of a container, on an image with nothing in it.

    Args:
        storage: Makes that image.
        clock: The current time, with its zone.
    """

    def __init__(self, storage: Storage, clock: Callable[[], datetime]) -> None:
        self._storage = storage
        self._clock = clock
        self._image: ImageFile | None = None
        self._off = False

    async def run(self, vm: Vm, session: GuestSession, *, configure: bool) -> None:
        """Rehearse in a fresh guest; nothing of it is left there but what is warm now.

        Args:
            vm: It has no disk yet, but for its slot.
            session: With its guest.
            configure: Whether to give it an identity, which what becomes a template must not have.

        Raises:
            UnavailableError: It did not go well: end this VM. None that comes after it will rehearse.
        """
        if self._off:
            return
        late = DeadlineExceededError(f"The rehearsal in VM {vm.record.vm_id} took longer than {LIMIT_S:g} s.")
        try:
            async with deadline_as(LIMIT_S, lambda: late):
                if configure:
                    await self._configure(vm, session)
                await self._run(vm, session)
        except VcnodeError as exc:
            self._off = True
            log.warning("A rehearsal went wrong; there will be no more", exc_info=exc)
            raise UnavailableError(f"The rehearsal in VM {vm.record.vm_id} went wrong.") from exc

    async def slot(self) -> SlotImage | None:
        """What guests that are to rehearse have in their slots; None: there are no rehearsals."""
        if self._off:
            return None
        try:
            image = await self._blank()
        except VcnodeError as exc:
            self._off = True
            log.warning("There is no image to rehearse with; there will be no rehearsals", exc_info=exc)
            return None
        return SlotImage(digest=image.digest, path=str(image.path))

    async def _blank(self) -> ImageFile:
        if self._image is None:
            self._image = await self._storage.blank_image(timeout_s=LIMIT_S)
        return self._image

    async def _configure(self, vm: Vm, session: GuestSession) -> None:
        config = GuestConfig(
            hostname=HOSTNAME,
            time_ns=int(self._clock().timestamp() * 1_000_000) * 1000,
            entropy=os.urandom(64),
            machine_id=uuid.UUID(vm.record.uuid).hex,
        )
        await session.configure(config, timeout_s=LIMIT_S)

    async def _run(self, vm: Vm, session: GuestSession) -> None:
        image = await self._blank()
        in_slot = vm.record.slot_digest == image.digest
        container = GuestContainer(
            container_id=CONTAINER_ID,
            root=ContainerRoot(disk_id=SLOT_DISK if in_slot else DISK_ID),
            hostname=HOSTNAME,
            process=GuestProcess(args=(PROGRAM,), capabilities=DEFAULT_CAPABILITIES),
        )
        if not in_slot:
            await vm.attach_disk(Disk(disk_id=DISK_ID, path=str(image.path)), timeout_s=LIMIT_S)
        # Twice from a slot, which shows that it is one: an earlier version's guest image lets go of the disk.
        for _ in range(1 + in_slot):
            await self._play(session, container)
        if not in_slot:
            await vm.detach_disk(DISK_ID, timeout_s=LIMIT_S)

    async def _play(self, session: GuestSession, container: GuestContainer) -> None:
        await session.create_container(container, timeout_s=LIMIT_S)
        await session.start_container(CONTAINER_ID, timeout_s=LIMIT_S)
        async with contextlib.aclosing(session.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, ContainerExited) and event.container_id == CONTAINER_ID:
                    break
        await session.delete_container(CONTAINER_ID, timeout_s=LIMIT_S)
