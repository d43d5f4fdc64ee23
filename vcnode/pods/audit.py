"""What the node holds on the host, whose it is, and the removal of what is nobody's.

A node agent that was killed may leave a VM that was to become a template, or things of a pod that its
database has forgotten. Ids of VMs are never used again, so what was an orphan once can be freed at leisure.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from vcnode.drivers.audit import Auditable, Held
from vcnode.drivers.logfiles import LogFiles, owner_of
from vcnode.errors import VcnodeError
from vcnode.models.node import Holding, NodeAudit
from vcnode.models.vm import NetworkAttachment
from vcnode.pods.marks import mark_of
from vcnode.pods.parts import KILL_LIMIT_S, REQUEST_LIMIT_S, Parts

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """A thing, and the driver that knows how to free it."""

    held: Held
    driver: Auditable


class Auditor:
    """Accounts for what the host holds for this node.

    Args:
        parts: Drivers and records.
        logs: What containers wrote.
        making: Ids of VMs that are being made into templates.
    """

    def __init__(self, parts: Parts, logs: LogFiles, making: Callable[[], Collection[str]]) -> None:
        self._parts = parts
        self._logs = logs
        self._making = making
        self._mark = mark_of(parts.settings)
        self._one = asyncio.Lock()

    async def audit(self, *, repair: bool) -> NodeAudit:
        """List everything; with *repair*, free the orphans.

        Raises nothing that a driver raises: what could not be looked at or freed is in ``problems``.
        """
        async with self._one:
            problems: list[str] = []
            owners = self._owners()
            found = await self._look(problems)
            owners |= self._owners()
            orphans = {f.held for f in found if is_orphan(f.held, owners)}
            if orphans:
                # A pod may have come and gone between two looks at the records. What is still there and
                # still nobody's was nobody's in between, too: a record is kept until all is freed.
                again = await self._look(problems)
                owners |= self._owners()
                orphans = {f.held for f in again if f.held in orphans and is_orphan(f.held, owners)}
            freed = await self._free([f for f in found if f.held in orphans], problems) if repair else set()
            self._report([f.held for f in found], orphans, freed)
        return NodeAudit(
            node=self._parts.settings.node_name,
            time=self._parts.clock(),
            holdings=tuple(
                Holding(
                    kind=f.held.kind,
                    name=f.held.name,
                    vm_id=f.held.vm_id,
                    pod_id=owners.get(f.held.vm_id or ""),
                    orphan=f.held in orphans,
                    freed=f.held in freed,
                )
                for f in found
            ),
            orphan_count=len(orphans),
            freed_count=len(freed),
            problems=tuple(dict.fromkeys(problems)),
        )

    def _owners(self) -> dict[str, str | None]:
        """VMs that may hold something, and their pod; None for one that is to become a template."""
        owners: dict[str, str | None] = dict.fromkeys(self._making())
        for record in self._parts.ledger.records.values():
            if record.vm is not None:
                owners[record.vm.vm_id] = record.pod_id
            if record.network is not None:
                owners[record.network.vm_id] = record.pod_id
            owners[owner_of(record.pod_id)] = record.pod_id
            if record.disk_id is not None:
                owners[record.disk_id] = record.pod_id
            owners |= {c.layer_id: record.pod_id for c in record.containers if c.layer_id is not None}
        return owners

    async def _look(self, problems: list[str]) -> list[_Found]:
        """Everything that carries the mark: processes first, what they use behind them."""
        found: list[_Found] = []
        for driver in self._drivers():
            try:
                async with asyncio.timeout(REQUEST_LIMIT_S):
                    found += [_Found(held, driver) for held in await driver.held(self._mark)]
            except Exception as exc:  # whatever it is: it must not end the audits
                problems.append(_problem(f"{type(driver).__name__} cannot say what it holds", exc))
                log.warning("%s", problems[-1], exc_info=exc)
        return found

    def _drivers(self) -> list[Auditable]:
        parts = self._parts
        every = (
            *parts.hypervisors.values(),
            *parts.networks.values(),
            parts.storage,
            parts.images,
            self._logs,
        )
        return [driver for driver in every if isinstance(driver, Auditable)]

    async def _free(self, orphans: Sequence[_Found], problems: list[str]) -> set[Held]:
        """Free orphans, and the networks of their VMs; what follows on a failure is left with it."""
        freed: set[Held] = set()
        stuck: set[str | None] = set()
        for orphan in orphans:
            held = orphan.held
            if held.vm_id is not None and held.vm_id in stuck:
                continue  # nothing is taken away below a process that lives
            try:
                async with asyncio.timeout(KILL_LIMIT_S + REQUEST_LIMIT_S):
                    await orphan.driver.free(held, timeout_s=KILL_LIMIT_S)
                freed.add(held)
            except Exception as exc:  # as above
                stuck.add(held.vm_id)
                problems.append(_problem(f"{held.kind} {held.name} of no pod stays", exc))
                log.warning("%s", problems[-1], exc_info=exc)
        for vm_id in {o.held.vm_id for o in orphans if o.held.vm_id} - stuck:
            await self._detach(vm_id, problems)
        return freed

    async def _detach(self, vm_id: str, problems: list[str]) -> None:
        """Remove what networks that cannot list anything may have made for a VM."""
        for model, network in self._parts.networks.items():
            try:
                async with asyncio.timeout(REQUEST_LIMIT_S):
                    await network.detach(
                        NetworkAttachment(model=model, vm_id=vm_id), timeout_s=REQUEST_LIMIT_S
                    )
            except Exception as exc:  # as above
                problems.append(_problem(f"The network of VM {vm_id}, which is no pod's, stays", exc))
                log.warning("%s", problems[-1], exc_info=exc)

    def _report(self, found: Sequence[Held], orphans: Collection[Held], freed: Collection[Held]) -> None:
        for held in sorted(orphans, key=lambda h: (h.vm_id or "", h.kind, h.name)):
            fate = "freed" if held in freed else "left as it is"
            log.warning("Orphan: %s %s of VM %s: %s", held.kind, held.name, held.vm_id or "none", fate)
        left = [held for held in orphans if held not in freed]
        self._parts.observer.audited(
            held=Counter(h.kind for h in found if h not in freed),
            orphans=Counter(h.kind for h in left),
            freed=len(freed),
        )


def is_orphan(held: Held, owners: Mapping[str, str | None]) -> bool:
    """Whether a thing is for a VM that nobody has, or nobody's for another reason."""
    return held.unclaimed or (held.vm_id is not None and held.vm_id not in owners)


def _problem(what: str, exc: Exception) -> str:
    if isinstance(exc, VcnodeError):
        return f"{what}: {exc.message}"
    if isinstance(exc, TimeoutError):
        return f"{what}: it took too long"
    return f"{what}: {exc.strerror if isinstance(exc, OSError) and exc.strerror else type(exc).__name__}"
