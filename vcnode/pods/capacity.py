"""What the node has, what pods have of it, and what is left. Pure, but for the clock of reservations.

What pods have is never counted up and down: it is the sum over their records, looked at in the transaction
that adds one more. So it is exact whatever was killed, and nothing has to be mended.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vcnode.errors import FailedPreconditionError, ResourceExhaustedError
from vcnode.models.node import Amount
from vcnode.models.pod import ContainerSpec, PodSpec
from vcnode.models.records import PodRecord

NOTHING = Amount(vcpu_count=0, mem_mib=0, disk_mib=0, pods=0)
MAX_RESERVATIONS = 4096
_UNITS = {"vcpu_count": "vCPUs", "mem_mib": "MiB of memory", "disk_mib": "MiB of disk", "pods": "pods"}


def plus(one: Amount, other: Amount) -> Amount:
    """The sum."""
    return Amount(
        vcpu_count=one.vcpu_count + other.vcpu_count,
        mem_mib=one.mem_mib + other.mem_mib,
        disk_mib=one.disk_mib + other.disk_mib,
        pods=one.pods + other.pods,
    )


def minus(one: Amount, other: Amount) -> Amount:
    """What is left of *one*, never below zero."""
    return Amount(
        vcpu_count=max(0, one.vcpu_count - other.vcpu_count),
        mem_mib=max(0, one.mem_mib - other.mem_mib),
        disk_mib=max(0, one.disk_mib - other.disk_mib),
        pods=max(0, one.pods - other.pods),
    )


def _sum(amounts: Sequence[Amount]) -> Amount:
    return Amount(
        vcpu_count=sum(amount.vcpu_count for amount in amounts),
        mem_mib=sum(amount.mem_mib for amount in amounts),
        disk_mib=sum(amount.disk_mib for amount in amounts),
        pods=sum(amount.pods for amount in amounts),
    )


def need_of(
    spec: PodSpec, containers: Iterable[ContainerSpec], *, overhead_mib: int, mem_size_mib: int | None = None
) -> Amount:
    """What a pod takes: its VM with what QEMU needs besides, and the disks of its containers.

    *mem_size_mib*: what its guest has, if not what the spec says.
    """
    return Amount(
        vcpu_count=spec.resources.vcpu_count,
        mem_mib=(mem_size_mib or spec.resources.mem_size_mib) + overhead_mib,
        disk_mib=sum(container.wanted_disk_mib for container in containers),
        pods=1,
    )


def shortage(need: Amount, left: Amount) -> dict[str, int]:
    """What is short, and by how much; empty when the need can be met."""
    return {
        name: getattr(need, name) - getattr(left, name)
        for name in _UNITS
        if getattr(need, name) > getattr(left, name)
    }


def sentence(what: str, need: Amount, left: Amount, short: dict[str, int]) -> str:
    """The shortage in words."""
    parts = [
        f"{getattr(need, name)} {_UNITS[name]} ({getattr(left, name)} left, {by} short)"
        for name, by in short.items()
    ]
    return f"{what} needs {' and '.join(parts)}; delete pods, or choose another node."


@dataclass(frozen=True, slots=True)
class Reservation:
    """What is kept for a pod that may come."""

    id: str
    need: Amount
    expires: float
    """By the clock of `Reservations`."""


class Reservations:
    """What was promised in bids; single-use, and gone after a while. A restart breaks all promises.

    Used by the loop and by the thread of the database's transactions.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, Reservation] = {}
        self._claimed: dict[str, Reservation] = {}

    def hold(self, need: Amount, seconds: float) -> Reservation:
        """Keep *need* for so long.

        Raises:
            ResourceExhaustedError: More promises are open than a node can sensibly have.
        """
        with self._lock:
            self._expire()
            if len(self._open) >= MAX_RESERVATIONS:
                raise ResourceExhaustedError(
                    f"{MAX_RESERVATIONS} reservations are open, which is the limit.", limit=MAX_RESERVATIONS
                )
            made = Reservation(f"r-{secrets.token_hex(12)}", need, self._clock() + seconds)
            self._open[made.id] = made
            return made

    def release(self, reservation_id: str) -> bool:
        """Keep it no longer; whether it was kept."""
        with self._lock:
            self._expire()
            return self._open.pop(reservation_id, None) is not None

    def longest_s(self) -> float:
        """Seconds until all that is kept now has expired."""
        with self._lock:
            now = self._clock()
            return max((held.expires - now for held in self._open.values()), default=0.0)

    @contextlib.contextmanager
    def claimed(self, reservation_id: str | None) -> Iterator[None]:
        """Use a reservation for what the block creates; it is kept until the block's end.

        When the block fails the reservation is open again, for the time that it had left.

        Raises:
            FailedPreconditionError: It was used, has expired, or was never made here.
        """
        if reservation_id is None:
            yield
            return
        with self._lock:
            self._expire()
            found = self._open.pop(reservation_id, None)
            if found is None:
                raise FailedPreconditionError(
                    f"Reservation {reservation_id} was used, has expired, or is of another node or of before "
                    "a restart; ask for bids again.",
                    reservation=reservation_id,
                )
            self._claimed[found.id] = found
        try:
            yield
        except BaseException:
            with self._lock:
                self._open[found.id] = found
            raise
        finally:
            with self._lock:
                del self._claimed[found.id]

    def total(self, *, but: str | None = None) -> Amount:
        """All that is kept now, except the reservation *but*."""
        with self._lock:
            self._expire()
            held = [*self._open.values(), *self._claimed.values()]
        return _sum([one.need for one in held if one.id != but])

    def _expire(self) -> None:
        now = self._clock()
        for held in [held for held in self._open.values() if held.expires <= now]:
            del self._open[held.id]


class Capacity:
    """Admits pods.

    Args:
        total: What pods may have of the node, over-commitment included.
        overhead_mib: Memory of a VM besides its guest's.
        reservations: What is promised.
    """

    def __init__(
        self, total: Callable[[], Amount], *, overhead_mib: int, reservations: Reservations | None = None
    ) -> None:
        self._total = total
        self._overhead_mib = overhead_mib
        self._counted: tuple[Mapping[str, PodRecord], Amount] = ({}, NOTHING)
        self.reservations = reservations or Reservations()
        """Open promises."""

    @property
    def overhead_mib(self) -> int:
        """What a VM is reckoned to take besides its guest's memory."""
        return self._overhead_mib

    @property
    def total(self) -> Amount:
        """What pods may have in all."""
        return self._total()

    def need(self, spec: PodSpec) -> Amount:
        """What a pod would take."""
        return need_of(spec, spec.containers, overhead_mib=self._overhead_mib)

    def taken(self, records: Iterable[PodRecord]) -> Amount:
        """What pods take, containers that were added later included, promises not."""
        return _sum([self._taken(record) for record in records])

    def taken_now(self, snapshot: Mapping[str, PodRecord]) -> Amount:
        """The same of a whole snapshot of the records, added up once: bids come far oftener than pods."""
        counted, amount = self._counted
        if counted is not snapshot:
            amount = self.taken(snapshot.values())
            self._counted = snapshot, amount
        return amount

    def _taken(self, record: PodRecord) -> Amount:
        specs = (container.spec for container in record.containers)
        return need_of(record.spec, specs, overhead_mib=self._overhead_mib, mem_size_mib=record.mem_size_mib)

    def reserved(self, records: Iterable[PodRecord]) -> Amount:
        """What pods take, and what bids have promised."""
        return plus(self.taken(records), self.reservations.total())

    def left(self, records: Iterable[PodRecord], *, reservation: str | None = None) -> Amount:
        """What a new pod can get beside *records*; *reservation* is its own and does not count."""
        return minus(self.total, plus(self.taken(records), self.reservations.total(but=reservation)))

    def admit(
        self, others: Iterable[PodRecord], record: PodRecord, *, reservation: str | None = None
    ) -> None:
        """See that a pod fits beside the others.

        Args:
            others: All other pods.
            record: The pod, new, with one more container, or larger.
            reservation: Its own, if it has one.

        Raises:
            ResourceExhaustedError: It does not; says what is short and by how much.
        """
        need, left = self._taken(record), self.left(others, reservation=reservation)
        if short := shortage(need, left):
            raise ResourceExhaustedError(
                sentence(f"Pod {record.pod_id}", need, left, short),
                short=short,
                needed=need.model_dump(),
                left=left.model_dump(),
            )
