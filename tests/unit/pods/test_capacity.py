"""Capacity: exact, whoever asks at once, and clear about what is short."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.errors import FailedPreconditionError, ResourceExhaustedError
from vcnode.models.node import Amount
from vcnode.models.pod import ContainerSpec, PodSpec, PodState, Resources
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.pods import capacity, host
from vcnode.pods.capacity import Capacity, Reservations
from vcnode.settings import CapacitySettings

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TOTAL = Amount(vcpu_count=4, mem_mib=1000, disk_mib=2048, pods=3)


def spec(pod_id: str = "p1", mem: int = 256, cpus: int = 1, disk: int | None = None) -> PodSpec:
    containers = (
        () if disk is None else (ContainerSpec(id="c", image="i", writable="disk", disk_size_mib=disk),)
    )
    resources = Resources(vcpu_count=cpus, mem_size_mib=mem)
    return PodSpec(id=pod_id, resources=resources, containers=containers)


def record(given: PodSpec) -> PodRecord:
    return PodRecord(
        pod_id=given.id or "",
        spec=given,
        hypervisor_type="mock",
        agent_type="mock",
        network_model="noop",
        state=PodState.READY,
        created_at=NOW,
        containers=tuple(ContainerRecord(spec=c, created_at=NOW) for c in given.containers),
    )


def make(overhead_mib: int = 50) -> Capacity:
    return Capacity(lambda: TOTAL, overhead_mib=overhead_mib)


def test_a_pod_takes_its_memory_its_overhead_and_its_disks() -> None:
    assert make().need(spec(mem=256, cpus=2, disk=512)) == Amount(
        vcpu_count=2, mem_mib=306, disk_mib=512, pods=1
    )


@pytest.mark.parametrize(
    ("wanted", "short", "said"),
    [
        ({"mem": 900}, {"mem_mib": 256}, "950 MiB of memory (694 left, 256 short)"),
        ({"cpus": 4}, {"vcpu_count": 1}, "4 vCPUs (3 left, 1 short)"),
        ({"disk": 2048}, {"disk_mib": 512}, "2048 MiB of disk (1536 left, 512 short)"),
    ],
)
def test_a_refusal_says_what_is_short_and_by_how_much(
    wanted: dict[str, int], short: dict[str, int], said: str
) -> None:
    others = [record(spec("p0", disk=512))]
    with pytest.raises(ResourceExhaustedError) as refused:
        make().admit(others, record(spec(**wanted)))
    assert refused.value.details["short"] == short
    assert said in refused.value.message


def test_as_many_pods_as_there_is_room_for() -> None:
    books = make(overhead_mib=0)
    others = [record(spec(f"p{number}", mem=128)) for number in range(3)]
    with pytest.raises(ResourceExhaustedError, match=r"1 pods \(0 left, 1 short\)"):
        books.admit(others, record(spec("p3", mem=128)))
    books.admit(others[1:], record(spec("p3", mem=128)))


def test_a_reservation_keeps_its_room_for_who_has_it() -> None:
    books = make(overhead_mib=0)
    kept = books.reservations.hold(books.need(spec(mem=600)), 10)
    with pytest.raises(ResourceExhaustedError):
        books.admit([], record(spec("thief", mem=600)))
    with books.reservations.claimed(kept.id):
        with pytest.raises(ResourceExhaustedError):
            books.admit([], record(spec("thief", mem=600)))
        books.admit([], record(spec("owner", mem=600)), reservation=kept.id)
    assert books.reservations.total() == capacity.NOTHING
    with pytest.raises(FailedPreconditionError, match="was used"), books.reservations.claimed(kept.id):
        pass


def test_a_reservation_is_open_again_when_nothing_came_of_it() -> None:
    kept = Reservations()
    made = kept.hold(TOTAL, 10)
    with pytest.raises(ZeroDivisionError), kept.claimed(made.id):
        raise ZeroDivisionError
    with kept.claimed(made.id):
        assert kept.total() == TOTAL


def test_a_reservation_expires() -> None:
    now = 100.0
    kept = Reservations(lambda: now)
    made = kept.hold(TOTAL, 5)
    now += 4.9
    assert kept.total() == TOTAL
    now += 0.2
    assert kept.total() == capacity.NOTHING
    with pytest.raises(FailedPreconditionError, match="has expired"), kept.claimed(made.id):
        pass


def test_promises_are_bounded() -> None:
    kept = Reservations()
    for _ in range(capacity.MAX_RESERVATIONS):
        kept.hold(capacity.NOTHING, 60)
    with pytest.raises(ResourceExhaustedError, match="reservations are open"):
        kept.hold(capacity.NOTHING, 60)


@given(st.lists(st.tuples(st.integers(128, 400), st.integers(1, 4)), max_size=12))
def test_what_was_admitted_never_exceeds_what_there_is(wanted: list[tuple[int, int]]) -> None:
    books = make()
    admitted: list[PodRecord] = []
    for number, (mem, cpus) in enumerate(wanted):
        new = record(spec(f"p{number}", mem=mem, cpus=cpus))
        try:
            books.admit(admitted, new)
        except ResourceExhaustedError:
            continue
        admitted.append(new)
    taken = books.taken(admitted)
    assert all(getattr(taken, name) <= getattr(TOTAL, name) for name in ("vcpu_count", "mem_mib", "pods"))


def test_settings_override_the_host_and_overcommit_it() -> None:
    found = Amount(vcpu_count=2, mem_mib=4096, disk_mib=100, pods=0)
    settings = CapacitySettings(
        mem_mib=2048, reserved_mem_mib=48, cpu_overcommit=4, mem_overcommit=1.5, disk_overcommit=2
    )
    have = host.capacity(found, settings, pods=9)
    assert have == Amount(vcpu_count=2, mem_mib=2048, disk_mib=100, pods=9)
    assert host.allocatable(have, settings) == Amount(vcpu_count=8, mem_mib=3000, disk_mib=200, pods=9)
