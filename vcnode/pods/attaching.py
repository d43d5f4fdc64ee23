"""The commands that add volumes to pods and take them away again."""

from __future__ import annotations

from vcnode.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    ResourceExhaustedError,
)
from vcnode.models.call import Call
from vcnode.models.records import PodRecord
from vcnode.models.volumes import MAX_VOLUMES, Volume
from vcnode.pods import edits
from vcnode.pods.admission import Admission
from vcnode.pods.lifecycle import POD_HAS_VM, POD_TAKES_CONTAINERS, require
from vcnode.pods.parts import Parts
from vcnode.pods.volumes import is_device


class Attaching:
    """One method per command. The caller holds the pod's lock."""

    def __init__(self, parts: Parts, admission: Admission) -> None:
        self._parts = parts
        self._admission = admission

    async def attach(self, pod_id: str, volume: Volume, call: Call) -> PodRecord:
        """Add a volume; containers that are created from now on can mount it. Idempotent.

        Raises:
            NotFoundError, InvalidArgumentError, UnsupportedError: As `Admission.volume`, or there is no such
                pod.
            AlreadyExistsError: The pod has another volume of that tag.
            FailedPreconditionError: The pod is paused, or starts or stops; or it runs, and the volume is
                one that only a start can give it.
            ResourceExhaustedError: The pod has as many as it may.
        """
        record = self._parts.ledger.get(pod_id, call)
        known = next((v for v in record.volumes if v.mount_tag == volume.mount_tag), None)
        if known is not None:
            if known != volume:
                raise AlreadyExistsError(
                    f"Pod {pod_id} has another volume {volume.mount_tag}; detach it, or choose another tag.",
                    pod_id=pod_id,
                )
            return record
        require(f"Pod {pod_id}", record.state, POD_TAKES_CONTAINERS, call.verb)
        if record.state in POD_HAS_VM and is_device(volume, self._parts.agent(record).info):
            raise FailedPreconditionError(
                f"Pod {pod_id} can get volume {volume.mount_tag} by a start only; stop it first.",
                pod_id=pod_id,
            )
        if len(record.volumes) >= MAX_VOLUMES:
            raise ResourceExhaustedError(f"Pod {pod_id} has {MAX_VOLUMES} volumes, the most it may have.")
        await self._admission.volume(volume, record)
        return await self._parts.ledger.change(pod_id, edits.volume_attached(volume, call.verb), call)

    async def detach(self, pod_id: str, mount_tag: str, call: Call) -> PodRecord:
        """Take a volume away that no container mounts. Succeeds when there is none of that tag.

        Raises:
            NotFoundError: There is no such pod.
            FailedPreconditionError: A container mounts it; or as `attach`.
        """
        record = self._parts.ledger.get(pod_id, call)
        volume = next((v for v in record.volumes if v.mount_tag == mount_tag), None)
        if volume is None:
            return record
        require(f"Pod {pod_id}", record.state, POD_TAKES_CONTAINERS, call.verb)
        if record.state in POD_HAS_VM and is_device(volume, self._parts.agent(record).info):
            raise FailedPreconditionError(
                f"Volume {mount_tag} is a device of the VM of pod {pod_id}; stop the pod.",
                pod_id=pod_id,
            )
        return await self._parts.ledger.change(pod_id, edits.volume_detached(mount_tag, call.verb), call)
