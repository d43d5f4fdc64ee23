"""Images that this node knows, by name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from datetime import datetime

from vcnode.drivers.base import ImageFile, Storage
from vcnode.errors import AbortedError, FailedPreconditionError, NotFoundError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.commands import ImageRemoved, ImageStatuses
from vcnode.models.events import EventKind
from vcnode.models.node import ImageStatus
from vcnode.models.records import PodRecord
from vcnode.pods.store import Store, Tx

log = logging.getLogger(__name__)

IMPORT_LIMIT_S = 3600.0
"""Seconds that making an image may take when the command sets no deadline."""


class ImageService:
    """Imports, lists and removes images; their files are the storage driver's.

    Args:
        store: The database.
        storage: Makes and keeps the files.
        clock: Gives the current time, with its zone.
        mock: Whether the node only pretends; marks the events.
    """

    def __init__(
        self, store: Store, storage: Storage, *, clock: Callable[[], datetime], mock: bool = False
    ) -> None:
        self._store = store
        self._storage = storage
        self._clock = clock
        self._mock = mock
        self._importing: set[str] = set()
        self._sweeping = asyncio.Lock()
        self._doomed: set[str] = set()
        """Digests whose files go as soon as no import could be about to use them."""

    async def import_(self, name: str, path: str, call: Call) -> ImageStatus:
        """Make an image of a directory or tar file on the host; replaces one of the same name.

        Containers that exist keep the file that they were created with.

        Raises:
            AbortedError: An import under this name is under way.
            InvalidArgumentError: *path* is neither, or outside the allowed roots.
            NotFoundError: *path* does not exist.
            ResourceExhaustedError: There is no space for it.
            StorageError: It could not be made; nothing of it is left.
        """
        if name in self._importing:
            raise AbortedError(f"Image {name} is being imported by another command.", name=name)
        self._importing.add(name)
        try:
            async with self._sweeping:
                pass  # a sweep under way might delete just the file that this import makes again
            file = await self._storage.build_image(path, timeout_s=IMPORT_LIMIT_S)
            image = ImageStatus(
                name=name, digest=file.digest, size_bytes=file.size_bytes, imported_at=self._clock()
            )
            replaced = self._store.images.get(name)
            await self._store.write(lambda tx: self._save(tx, image, call))
            if replaced is not None and replaced.digest != image.digest:
                self._doomed.add(replaced.digest)
        finally:
            self._importing.discard(name)
        await self._sweep()
        return self.status(name)

    def list(self) -> ImageStatuses:
        """All images, ordered by name."""
        return ImageStatuses(images=tuple(self.status(name) for name in sorted(self._store.images)))

    def status(self, name: str) -> ImageStatus:
        """One image. Raises NotFoundError when there is none of that name."""
        image = self._store.images.get(name)
        if image is None:
            raise _unknown(name)
        in_use = bool(_users(self._store.pods.values(), name))
        return image.model_copy(update={"in_use": in_use})

    async def remove(self, name: str, call: Call) -> ImageRemoved:
        """Forget an image and delete its file. Idempotent.

        Raises:
            FailedPreconditionError: A container names it; ``details["containers"]`` says which.
        """

        def remove(tx: Tx) -> ImageStatus | None:
            image = tx.images.get(name)
            if image is None:
                return None
            if users := _users(tx.pods.values(), name):
                raise FailedPreconditionError(
                    f"Image {name} is used by {', '.join(users[:5])}; delete that first.", containers=users
                )
            tx.forget_image(name)
            tx.emit(
                EventKind.IMAGE_REMOVED,
                f"image/{name}",
                image.model_dump(mode="json"),
                time=self._clock(),
                mock=self._mock,
                command_id=call.command_id,
            )
            return image

        image = await self._store.write(remove)
        if image is not None:
            self._doomed.add(image.digest)
            await self._sweep()
        return ImageRemoved(name=name, existed=image is not None)

    async def resolve(self, name: str) -> ImageFile:
        """The file that an image is now.

        Raises:
            NotFoundError: There is no image of that name, or its file is gone.
        """
        image = self._store.images.get(name)
        if image is None:
            raise _unknown(name)
        return await self._storage.image_file(image.digest)

    def _save(self, tx: Tx, image: ImageStatus, call: Call) -> None:
        tx.save_image(image)
        tx.emit(
            EventKind.IMAGE_IMPORTED,
            f"image/{image.name}",
            image.model_dump(mode="json"),
            time=self._clock(),
            mock=self._mock,
            command_id=call.command_id,
        )

    async def _sweep(self) -> None:
        """Delete the files of forgotten images that nothing uses."""
        async with self._sweeping:
            while self._doomed and not self._importing:
                digest = self._doomed.pop()
                if digest in self._used_digests():
                    continue
                try:
                    await self._storage.remove_image(digest)
                except VcnodeError as exc:
                    # The image is forgotten all the same; a file that nobody names only costs space.
                    log.warning("The file of image %s stays: %s", digest, exc.message, exc_info=exc)

    def _used_digests(self) -> set[str]:
        used = {image.digest for image in self._store.images.values()}
        containers = (c for pod in self._store.pods.values() for c in pod.containers)
        used.update(c.image_digest for c in containers if c.image_digest is not None)
        return used


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(
        f"This node has no image {name}; import it with image.import, or choose one of image.list.", name=name
    )


def _users(pods: Iterable[PodRecord], name: str) -> list[str]:
    """``<pod>/<container>`` of every container that names the image."""
    return [f"{pod.pod_id}/{c.spec.id}" for pod in pods for c in pod.containers if c.spec.image == name]
