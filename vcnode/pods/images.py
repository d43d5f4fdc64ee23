"""Images that this node knows, by name."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from datetime import datetime

from vcnode import aio
from vcnode.aio import Spawner
from vcnode.drivers.audit import Held
from vcnode.drivers.base import ImageFile, PullSource, Storage
from vcnode.errors import AbortedError, FailedPreconditionError, NotFoundError, VcnodeError
from vcnode.models.base import JsonObject
from vcnode.models.call import Call
from vcnode.models.commands import ImagePull, ImageRemoved, ImageStatuses
from vcnode.models.events import EventKind
from vcnode.models.image import ImageConfig, PullProgress
from vcnode.models.node import ImageStatus
from vcnode.models.records import PodRecord
from vcnode.pods.collecting import victims
from vcnode.pods.flights import Flights
from vcnode.pods.policy import judge_digest, require
from vcnode.pods.store import Store, Tx
from vcnode.settings import ImageSettings, PolicySettings

log = logging.getLogger(__name__)

IMPORT_LIMIT_S = 3600.0
"""Seconds that making an image may take when the command sets no deadline."""
PULL_LIMIT_S = 3600.0
"""Seconds that a pull may take, however many commands wait for it; each gives up at its own deadline."""
SWEEP_LIMIT_S = 60.0
"""Seconds that deleting files may take at the end of an import; what is left goes with the next sweep."""


class ImageService:
    """Pulls, imports, lists and removes images; their files are the storage driver's.

    Args:
        store: The database.
        storage: Makes and keeps the files.
        tasks: Runs pulls, which several commands may wait for.
        settings: Watermarks.
        clock: Gives the current time, with its zone.
        mock: Whether the node only pretends; marks the events.
        policy: Judges what registries have; that a pull may be asked for at all was judged before.
    """

    def __init__(
        self,
        store: Store,
        storage: Storage,
        *,
        tasks: Spawner,
        settings: ImageSettings,
        clock: Callable[[], datetime],
        mock: bool = False,
        policy: PolicySettings = PolicySettings(),  # noqa: B008 -- frozen
    ) -> None:
        self._policy = policy
        self._store = store
        self._storage = storage
        self._clock = clock
        self._mock = mock
        self._settings = settings
        self._pulls: Flights[None] = Flights(tasks)
        self._used_at: dict[str, datetime] = {}
        """Uses since the last save; saved along with the next change: a pod's start waits for no image."""
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
            StorageError: It could not be made or recorded; nothing of it is left. Unless the disk has not
                answered: the record may come yet, and a file that gets no name goes with the next audit.
        """
        async with self._making(name):
            file = await self._storage.build_image(path, timeout_s=IMPORT_LIMIT_S)
            await self._keep(name, file, None, EventKind.IMAGE_IMPORTED, call)
        await self.collect()
        return self.status(name)

    async def pull(self, request: ImagePull, call: Call) -> ImageStatus:
        """Fetch an image from a registry; replaces one of the same name.

        The same pull twice at once is one pull, which goes on for as long as one of the callers waits. When
        what the registry has is here already, nothing is fetched. Containers that exist keep their file.

        Raises:
            AbortedError: Another import or pull under this name is under way.
            InvalidArgumentError: The registry refuses the credentials, or the image cannot be used.
            NotFoundError: The registry has no such image.
            PermissionDeniedError: The policy forbids what the registry has there; nothing was fetched.
            UnavailableError: The registry does not answer, or the node agent is stopping.
            ResourceExhaustedError: There is no space for it.
            StorageError: It could not be made or recorded; nothing of it is left. Unless the disk has not
                answered: the record may come yet, and a file that gets no name goes with the next audit.
        """
        name = request.name or request.reference
        # Who asks belongs to the key: nobody may get by another's credentials what he must not see.
        key = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        await self._pulls.join(f"pull {name} {key}", lambda: self._pull(name, request, call))
        return self.status(name)

    async def collect(self) -> list[str]:
        """Remove unused images if all together take too much room; returns their names."""

        def remove(tx: Tx) -> list[ImageStatus]:
            images = [self._with_use(image) for image in tx.images.values()]
            in_use = {name for name in tx.images if _users(tx.pods.values(), name)}
            names = victims(
                images,
                in_use,
                self._clock(),
                high_mib=self._settings.gc_high_mib,
                low_mib=self._settings.gc_low_mib,
                min_age_s=self._settings.gc_min_age_s,
            )
            gone = [tx.images[name] for name in names]
            for image in gone:
                self._forget(tx, image, None)
            return gone

        gone = await self._store.write(remove)
        self._doomed.update(image.digest for image in gone)
        await self._sweep()
        if gone:
            log.info("Images take too much room; removed %s", ", ".join(image.name for image in gone))
        return [image.name for image in gone]

    @property
    def known(self) -> Mapping[str, ImageStatus]:
        """All images by name, as the database has them. A snapshot."""
        return self._store.images

    @property
    def names(self) -> Set[str]:
        """Names of all images."""
        return self._store.images.keys()

    def list(self) -> ImageStatuses:
        """All images, ordered by name."""
        return ImageStatuses(images=tuple(self.status(name) for name in sorted(self._store.images)))

    def status(self, name: str) -> ImageStatus:
        """One image. Raises NotFoundError when there is none of that name."""
        image = self._store.images.get(name)
        if image is None:
            raise _unknown(name)
        in_use = bool(_users(self._store.pods.values(), name))
        return self._with_use(image).model_copy(update={"in_use": in_use})

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
            self._forget(tx, image, call)
            return image

        image = await self._store.write(remove)
        if image is not None:
            self._doomed.add(image.digest)
            await self._sweep()
        return ImageRemoved(name=name, existed=image is not None)

    async def resolve(self, name: str) -> tuple[ImageFile, ImageConfig]:
        """The file that an image is now, and its config; counts as a use.

        Raises:
            NotFoundError: There is no image of that name, or its file is gone.
        """
        image = self._store.images.get(name)
        if image is None:
            raise _unknown(name)
        self._used_at[name] = self._clock()
        return await self._storage.image_file(image.digest), image.config

    async def held(self, mark: str) -> Sequence[Held]:
        """See `vcnode.drivers.audit.Auditable`: every image file in the node's own directory.

        One that neither an image nor a container names is unclaimed: the database that knew it is lost. While
        an import or pull runs none is, for that may be about to give it a name.
        """
        files = await self._storage.image_files()
        claimed = None if self._importing else self._used_digests() | self._doomed
        return [
            Held("image", str(file.path), None, unclaimed=claimed is not None and file.digest not in claimed)
            for file in files
        ]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See `vcnode.drivers.audit.Auditable`. Raises AbortedError when an import could claim it by now."""
        async with self._sweeping:
            files = [file for file in await self._storage.image_files() if str(file.path) == held.name]
            # From here to the end no import gets further than its beginning: it waits for this lock.
            for file in files:
                if self._importing or file.digest in self._used_digests():
                    raise AbortedError(f"Image file {file.digest} may be in use by now.", digest=file.digest)
                await self._storage.remove_image(file.digest)

    @asynccontextmanager
    async def _making(self, name: str) -> AsyncIterator[None]:
        """One import or pull under *name* at a time; files that it may use are not swept meanwhile."""
        if name in self._importing:
            raise AbortedError(f"Image {name} is being made by another command.", name=name)
        self._importing.add(name)
        try:
            async with self._sweeping:
                pass  # a sweep under way might delete just the file that is made again now
            yield
        finally:
            self._importing.discard(name)
            if self._doomed:
                await aio.finish(self._sweep(), timeout_s=SWEEP_LIMIT_S)

    async def _pull(self, name: str, request: ImagePull, call: Call) -> None:
        auth = request.auth
        source = PullSource(
            request.reference,
            username=None if auth is None else auth.username,
            password=None if auth is None else auth.password,
        )

        async def report(progress: PullProgress) -> None:
            data = {"name": name, "reference": request.reference, **progress.model_dump(mode="json")}
            try:
                await self._store.write(lambda tx: self._emit(tx, EventKind.IMAGE_PULLING, name, data, call))
            except VcnodeError as exc:
                # Progress is told, not owed: the pull itself will meet a database that cannot be written.
                log.warning("The progress of %s cannot be told: %s", name, exc.message)

        def resolved(manifest_digest: str) -> tuple[str, ImageConfig] | None:
            require(judge_digest(request.reference, manifest_digest, self._policy))
            return self._made_of(manifest_digest)

        async with self._making(name):
            file = await self._storage.pull_image(source, resolved, report, timeout_s=PULL_LIMIT_S)
            await self._keep(name, file, request.reference, EventKind.IMAGE_PULLED, call)
        await self.collect()

    def _made_of(self, manifest_digest: str) -> tuple[str, ImageConfig] | None:
        """The file and config of what was pulled with that manifest."""
        for image in self._store.images.values():
            if image.manifest_digest == manifest_digest and image.reference is not None:
                return image.digest, image.config
        return None

    async def _keep(
        self, name: str, file: ImageFile, reference: str | None, kind: EventKind, call: Call
    ) -> None:
        """Record an image that was made, in place of an earlier one of that name."""
        image = ImageStatus(
            name=name,
            digest=file.digest,
            size_bytes=file.size_bytes,
            imported_at=self._clock(),
            reference=reference,
            manifest_digest=file.manifest_digest,
            config=file.config or ImageConfig(),
        )

        def save(tx: Tx) -> ImageStatus | None:
            replaced = tx.images.get(name)
            tx.save_image(image)
            self._emit(tx, kind, name, image.model_dump(mode="json"), call)
            for used in self._used_at.keys() & tx.images.keys():
                tx.save_image(self._with_use(tx.images[used]))
            return replaced

        try:
            replaced = await self._store.write(save)
        except VcnodeError as exc:
            if exc.details.get("settled", True):  # else the record may come yet, and need its file
                self._doomed.add(file.digest)
            raise
        self._used_at.clear()
        if replaced is not None and replaced.digest != image.digest:
            self._doomed.add(replaced.digest)

    def _with_use(self, image: ImageStatus) -> ImageStatus:
        used_at = self._used_at.get(image.name)
        return image if used_at is None else image.model_copy(update={"last_used_at": used_at})

    def _forget(self, tx: Tx, image: ImageStatus, call: Call | None) -> None:
        tx.forget_image(image.name)
        data = image.model_dump(mode="json")
        self._emit(tx, EventKind.IMAGE_REMOVED, image.name, data, call)

    def _emit(self, tx: Tx, kind: EventKind, name: str, data: JsonObject, call: Call | None) -> None:
        tx.emit(
            kind,
            f"image/{name}",
            data,
            time=self._clock(),
            mock=self._mock,
            command_id=None if call is None else call.command_id,
            traceparent=None if call is None else call.traceparent,
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
        f"This node has no image {name}; get it by image.pull or image.import, or choose one of image.list.",
        name=name,
    )


def _users(pods: Iterable[PodRecord], name: str) -> list[str]:
    """``<pod>/<container>`` of every container that names the image."""
    return [f"{pod.pod_id}/{c.spec.id}" for pod in pods for c in pod.containers if c.spec.image == name]
