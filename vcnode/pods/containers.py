"""Containers inside a running guest: their roots, starts and ends. The caller holds the pod's lock."""

from __future__ import annotations

import asyncio

from vcnode.errors import AgentError, AlreadyExistsError, NotFoundError
from vcnode.models.pod import ContainerState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import (
    SLOT_BYTES,
    SLOT_DISK,
    ContainerRoot,
    Disk,
    GuestContainer,
    SlotImage,
    VmRecord,
)
from vcnode.pods.lifecycle import CONTAINER_ALIVE
from vcnode.pods.live import LivePod
from vcnode.pods.parts import KILL_LIMIT_S, REQUEST_LIMIT_S, Parts
from vcnode.pods.process import guest_process
from vcnode.pods.secrets import secret_names
from vcnode.pods.shares import check_can_share
from vcnode.pods.statuses import container_id, hostname_of
from vcnode.pods.undo import UndoStack
from vcnode.pods.volumes import guest_mounts, provide, withdraw

SIGKILL = 9
SIGTERM = 15

ASK_LIMIT_S = 5.0
"""Seconds that a guest may take to hear that its containers shall end, however short the grace."""


def disk_id_of(digest: str) -> str:
    """Serial of the disk that holds an image: containers of one image in one pod share it.

    ``d-`` and 16 hex digits; SCSI serials end at 20 characters here.
    """
    return f"d-{digest.removeprefix('sha256:')[:16]}"


class Containers:
    """Makes, starts, ends and removes containers in running guests."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def launch(self, live: LivePod, record: PodRecord, container: ContainerRecord) -> int:
        """Give a container its root, unless it has one from an earlier start, and start its main process.

        From here on the container counts as starting (`LivePod.starting`): an exit that is reported now
        waits until the caller has recorded the start. On any failure all is undone, as far as it can be;
        what is not ends with the VM.

        Returns:
            The main process's pid in the guest.
        """
        cid = container_id(container)
        session = live.require_session()
        undo = UndoStack()
        live.container_starts(cid)
        try:
            if cid not in live.provided:
                await self._provide(live, record, container, undo)
            undo.push(f"process of container {cid}", lambda: self._signal(live, cid, SIGKILL, everyone=True))
            try:
                return await session.start_container(cid, timeout_s=REQUEST_LIMIT_S)
            except NotFoundError:
                # Of an earlier session, and the agent has not kept what it was made of.
                await self.remove(live, container)
                await self._provide(live, record, container, undo)
                return await session.start_container(cid, timeout_s=REQUEST_LIMIT_S)
        except BaseException:
            live.container_did_not_start(cid)
            await undo.unwind()
            raise

    async def slot_image(self, record: PodRecord) -> SlotImage | None:
        """What a clone for the pod has in its slot: the image of its first container that has one.

        Raises:
            NotFoundError: The image is gone.
        """
        digest = next((c.image_digest for c in record.containers if c.image_digest is not None), None)
        if digest is None:
            return None
        file = await self._parts.storage.image_file(digest)
        return SlotImage(digest=digest, path=str(file.path)) if file.size_bytes <= SLOT_BYTES else None

    async def attach_images(self, live: LivePod, record: PodRecord) -> None:
        """Plug in what the pod's containers will need, so that the guest finds it while it does other things.

        Nothing is undone on failure: for starts, which end with the VM then.
        """
        for container in record.containers:
            await self._attach_image(live, container)

    async def halt(self, live: LivePod, container: ContainerRecord, *, grace_s: float) -> None:
        """Ask a running container's main process to end; kill all of it when the grace is over.

        A paused one is resumed, so that it can hear. Returns once its end is recorded.

        Raises:
            AgentError: It was still there `KILL_LIMIT_S` seconds after SIGKILL, or the guest cannot be asked.
        """
        cid = container_id(container)
        if grace_s > 0:
            await self._ask(live, container)
            if await _within(live.exit_event(cid), grace_s):
                return
        await self._signal(live, cid, SIGKILL, everyone=True)
        if not await _within(live.exit_event(cid), KILL_LIMIT_S):
            raise AgentError(
                f"Container {live.pod_id}/{cid} did not end within {KILL_LIMIT_S:.0f} s of SIGKILL."
            )

    async def halt_all(self, live: LivePod, record: PodRecord, *, grace_s: float) -> None:
        """Ask every running container to end; kill what still runs after *grace_s* seconds.

        Raises:
            TimeoutError: The guest is silent: it did not take the signals in the grace, or a container
                survived SIGKILL for `KILL_LIMIT_S`; what runs ends with the VM.
        """
        running = [c for c in record.containers if c.state in CONTAINER_ALIVE]
        ends = [live.exit_event(container_id(container)) for container in running]
        begun = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(begun + max(grace_s, ASK_LIMIT_S)):
            for container in running:
                await self._ask(live, container)
        try:
            async with asyncio.timeout_at(begun + grace_s):
                for end in ends:
                    await end.wait()
        except TimeoutError:
            async with asyncio.timeout(KILL_LIMIT_S):
                for container, end in zip(running, ends, strict=True):
                    if not end.is_set():
                        await self._signal(live, container_id(container), SIGKILL, everyone=True)
                        await end.wait()

    async def remove(self, live: LivePod, container: ContainerRecord) -> None:
        """Take a container that does not run out of the guest, and its root away. Can be repeated."""
        cid = container_id(container)
        await live.require_session().delete_container(cid, timeout_s=REQUEST_LIMIT_S)
        if (root := live.provided.get(cid)) is not None:
            await self._withdraw(live, cid, root)
            await withdraw(self._parts, live, self._parts.ledger.get(live.pod_id), container)
            del live.provided[cid]

    async def _ask(self, live: LivePod, container: ContainerRecord) -> None:
        """Send the stop signal, and see that it can be heard."""
        cid = container_id(container)
        await self._signal(live, cid, stop_signal(container), everyone=False)
        if container.state is ContainerState.PAUSED:
            await live.require_session().resume_container(cid, timeout_s=REQUEST_LIMIT_S)

    async def _signal(self, live: LivePod, cid: str, number: int, *, everyone: bool) -> None:
        session = live.require_session()
        await session.signal_container(cid, number, everyone=everyone, timeout_s=REQUEST_LIMIT_S)

    async def _provide(
        self, live: LivePod, record: PodRecord, container: ContainerRecord, undo: UndoStack
    ) -> None:
        """Make the container in the guest; *undo* gets what takes it away again."""
        cid = container_id(container)
        session = live.require_session()
        root = root_of(container, live.vm.record)
        undo.push(f"root of container {cid}", lambda: self._withdraw(live, cid, root))
        check_can_share(live.vm.record, container, record)
        if container.spec.mounts:
            undo.push(f"volumes of container {cid}", lambda: withdraw(self._parts, live, record, container))
            await provide(self._parts, live, record, container)
        if root.shared_name is not None and container.spec.rootfs is not None:
            await self._parts.storage.share(live.vm.record.vm_id, root.shared_name, container.spec.rootfs)
        else:
            await self._attach_image(live, container)
        if root.layer_disk_id is not None:
            await self._attach_layer(live, container, root.layer_disk_id)
        spec = container.spec
        opened = spec.model_copy(update={"cmd": await self._parts.secrets.cmd(spec.cmd)})
        wanted = GuestContainer(
            container_id=cid,
            root=root,
            readonly=container.spec.readonly_rootfs,
            hostname=hostname_of(record),
            process=guest_process(opened, container.image_config),
            secrets=await self._parts.secrets.files(spec),
            secret_envs=secret_names(spec.cmd),
            mounts=guest_mounts(record, spec),
            resources=container.limits,
            probes=container.spec.probes,
            stop_signal=stop_signal(container),
            stop_timeout_s=container.spec.stop_timeout_s,
            stdin=container.spec.stdin,
            tty=container.spec.tty,
        )
        undo.push(f"container {cid}", lambda: session.delete_container(cid, timeout_s=REQUEST_LIMIT_S))
        try:
            await session.create_container(wanted, timeout_s=REQUEST_LIMIT_S)
        except AlreadyExistsError:
            # Left over from a start whose undo did not get through to the guest.
            await session.delete_container(cid, timeout_s=REQUEST_LIMIT_S)
            await session.create_container(wanted, timeout_s=REQUEST_LIMIT_S)
        live.provided[cid] = root
        undo.push(f"note of container {cid}", lambda: _forget(live, cid))

    async def _attach_image(self, live: LivePod, container: ContainerRecord) -> None:
        """Plug the image's disk in, unless the container has none or it is there already."""
        disk_id = root_of(container, live.vm.record).disk_id
        if disk_id in (None, SLOT_DISK) or disk_id in live.plugged:
            return
        if live.disk_in_use(disk_id, besides=container_id(container)):
            return
        file = await self._parts.storage.image_file(container.image_digest or "")
        await live.vm.attach_disk(Disk(disk_id=disk_id, path=str(file.path)), timeout_s=REQUEST_LIMIT_S)
        live.plugged.add(disk_id)

    async def _attach_layer(self, live: LivePod, container: ContainerRecord, layer_id: str) -> None:
        """Plug the container's writable disk in, made at its first start; it stays until `remove_layers`."""
        size_mib = container.spec.wanted_disk_mib
        file = await self._parts.storage.make_layer(layer_id, size_mib, timeout_s=REQUEST_LIMIT_S)
        disk = Disk(disk_id=layer_id, path=str(file.path), read_only=False)
        await live.vm.attach_disk(disk, timeout_s=REQUEST_LIMIT_S)

    async def _withdraw(self, live: LivePod, cid: str, root: ContainerRoot) -> None:
        if root.layer_disk_id is not None:
            await live.vm.detach_disk(root.layer_disk_id, timeout_s=REQUEST_LIMIT_S)
        if root.shared_name is not None:
            await self._parts.storage.unshare(live.vm.record.vm_id, root.shared_name)
        elif root.disk_id not in (None, SLOT_DISK) and not live.disk_in_use(root.disk_id, besides=cid):
            live.plugged.discard(root.disk_id)
            await live.vm.detach_disk(root.disk_id, timeout_s=REQUEST_LIMIT_S)


def stop_signal(container: ContainerRecord) -> int:
    """The signal that asks the container's main process to end."""
    return container.spec.stop_signal or container.image_config.stop_signal or SIGTERM


def root_of(container: ContainerRecord, vm: VmRecord) -> ContainerRoot:
    """Where the guest finds the container's root, once it is provided."""
    if (digest := container.image_digest) is not None:
        disk_id = SLOT_DISK if digest == vm.slot_digest else disk_id_of(digest)
        return ContainerRoot(disk_id=disk_id, layer_disk_id=container.layer_id)
    return ContainerRoot(shared_name=container_id(container))


async def _forget(live: LivePod, cid: str) -> None:
    live.provided.pop(cid, None)


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for *event*, at most so long; whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
