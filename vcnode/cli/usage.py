"""How samples of ``pod.stats`` look to people, and the rates between two of them. Pure layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vcnode.cli.output import printable, show_table, size
from vcnode.models.stats import BlockStats, CpuStats, InterfaceStats, PodStats


def cpu_percent(now: CpuStats, before: CpuStats | None, seconds: float) -> float | None:
    """CPU of the time between two samples, 100 for one CPU; None when it was begun anew in between."""
    if before is None or seconds <= 0 or now.usage_us < before.usage_us:
        return None
    return (now.usage_us - before.usage_us) / seconds / 10_000


def seconds_between(now: PodStats, before: PodStats | None) -> float:
    """Seconds between two samples; 0 when there is no earlier one."""
    return 0.0 if before is None else (now.time - before.time).total_seconds()


@dataclass(frozen=True, slots=True)
class Row:
    """One line: a VM, a guest or a container."""

    kind: str
    name: str
    cpu: CpuStats
    memory: str
    pids: str
    block: str = ""
    network: str = ""


def rows(sample: PodStats) -> Iterator[Row]:
    """The lines of a sample."""
    if (vm := sample.vm) is not None:
        overhead = "" if vm.overhead_bytes is None else f" ({size(vm.overhead_bytes)} overhead)"
        used = vm.resident_bytes if vm.pss_bytes is None else vm.pss_bytes
        yield Row(
            "vm",
            "vm",
            vm.cpu,
            f"{size(used)}{overhead}",
            str(vm.thread_count),
            f"{size(vm.read_bytes)} / {size(vm.written_bytes)}",
            traffic(vm.interfaces) if vm.interfaces else "",
        )
    if (guest := sample.guest) is not None:
        used = max(0, guest.mem_total_bytes - guest.mem_available_bytes)
        memory = f"{size(used)} of {size(guest.mem_total_bytes)}"
        pids, disk, network = str(guest.pid_count), io(guest.block), traffic(guest.interfaces)
        yield Row("guest", "guest", guest.cpu, memory, pids, disk, network)
    for each in sample.containers:
        used, limit = each.memory.working_set_bytes, each.memory.limit_bytes
        yield Row(
            "container",
            each.container_id,
            each.cpu,
            size(used) if limit is None else f"{size(used)} of {size(limit)}",
            str(each.pid_count) if each.pid_limit is None else f"{each.pid_count} of {each.pid_limit}",
            "" if each.block is None else io(each.block),
        )


def io(block: BlockStats) -> str:
    """What was read and written."""
    return f"{size(block.read_bytes)} / {size(block.written_bytes)}"


def traffic(interfaces: Sequence[InterfaceStats]) -> str:
    """What all interfaces together have received and sent."""
    received = sum(each.received_bytes for each in interfaces)
    sent = sum(each.sent_bytes for each in interfaces)
    return f"{size(received)} / {size(sent)}"


def sample(now: PodStats, before: PodStats | None = None) -> None:
    """A table; CPU since the sample *before*, or in all when there is none."""
    seconds = seconds_between(now, before)
    earlier = {} if before is None else {(row.kind, row.name): row.cpu for row in rows(before)}

    def lines() -> Iterable[tuple[object, ...]]:
        for row in rows(now):
            percent = cpu_percent(row.cpu, earlier.get((row.kind, row.name)), seconds)
            cpu = f"{row.cpu.usage_us / 1e6:.2f} s" if percent is None else f"{percent:.1f} %"
            yield row.name, cpu, row.memory, row.pids, row.block, row.network

    print(f"{printable(now.pod_id)} at {now.time.isoformat(timespec='milliseconds')}")
    show_table(("", "CPU", "MEMORY", "PIDS", "DISK R / W", "NET IN / OUT"), lines())
