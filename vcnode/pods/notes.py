"""Notes: each running pod's record once more, in the directory of its VM.

The database is the truth as long as it is newer. A node agent that starts on an empty, rebuilt or older
database finds its running pods by their notes: without them it would take its own VMs for orphans.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from pydantic import ValidationError

from vcnode import logs
from vcnode.drivers.base import Storage
from vcnode.errors import VcnodeError
from vcnode.models.records import PodNote, PodRecord
from vcnode.pods.ledger import Ledger
from vcnode.pods.marks import mark_of
from vcnode.settings import Settings

log = logging.getLogger(__name__)


class Notes:
    """Keeps the notes, and finds in them what the database does not know.

    Args:
        ledger: The database's records.
        storage: Holds the directories of VMs.
        settings: Name and state directory of the node.
        epoch: Of this process.
        live: Pods whose VM this process holds: those have a directory.
    """

    def __init__(
        self, ledger: Ledger, storage: Storage, settings: Settings, *, epoch: int, live: Collection[str]
    ) -> None:
        self._ledger = ledger
        self._storage = storage
        self._settings = settings
        self._epoch = epoch
        self._live = live
        ledger.after_change = self._changed

    async def write(self, record: PodRecord) -> None:
        """Write the note of a pod whose VM has its directory.

        A failure is logged only: the database knows the pod.
        """
        if record.vm is None:
            return
        note = PodNote(node=self._settings.node_name, epoch=self._epoch, record=record)
        try:
            await self._storage.write_note(record.vm.vm_id, note.model_dump_json())
        except VcnodeError as exc:
            log.warning("Pod %s: its note cannot be written", record.pod_id, exc_info=exc)

    async def restore(self) -> tuple[str, ...]:
        """Put into the database what the notes know better; to be called before pods are recovered.

        Returns:
            Ids of pods that the database did not have, or had in an earlier state.
        """
        try:
            texts = await self._storage.read_notes(mark_of(self._settings))
        except VcnodeError as exc:
            log.warning("The notes of VMs cannot be read", exc_info=exc)
            return ()
        found = unknown(parse(texts, self._settings.node_name), self._ledger.records)
        for record in found:
            with logs.about(pod_id=record.pod_id):
                log.warning("Pod %s was found by the note of its VM; the database lacked it", record.pod_id)
        if found:
            await self._ledger.restore(found)
        return tuple(record.pod_id for record in found)

    async def _changed(self, record: PodRecord) -> None:
        if record.pod_id in self._live:
            await self.write(record)


def parse(texts: Mapping[str, str], node: str) -> list[PodRecord]:
    """The records in notes; what is not a note of this node about that very VM is left out.

    Args:
        texts: Notes by VM id.
        node: Name of the node.
    """
    records = []
    for vm_id, text in texts.items():
        try:
            note = PodNote.model_validate_json(text)
        except ValidationError:
            log.warning("The note of VM %s is damaged", vm_id)
            continue
        if note.node == node and note.record.vm is not None and note.record.vm.vm_id == vm_id:
            records.append(note.record)
        else:
            log.warning("The note of VM %s is about something else", vm_id)
    return records


def unknown(noted: Iterable[PodRecord], known: Mapping[str, PodRecord]) -> list[PodRecord]:
    """Those of *noted* that are newer than what is *known* of their pods; the newest of each pod."""
    newest: dict[str, PodRecord] = {}
    for record in noted:
        best = newest.get(record.pod_id) or known.get(record.pod_id)
        if best is None or _age(record) > _age(best):
            newest[record.pod_id] = record
    return list(newest.values())


def _age(record: PodRecord) -> tuple[float, int]:
    """Grows with each change of a pod; a pod made anew under the same id is newer than any before it."""
    return record.created_at.timestamp(), record.revision
