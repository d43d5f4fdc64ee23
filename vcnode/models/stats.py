"""What a pod uses: its VM on the host, its guest, and each of its containers.

Counters only grow while the VM lives; a rate is the difference of two samples by the difference of their
``time``. They begin again when the pod, or a container, is started anew.
"""

from __future__ import annotations

from pydantic import Field

from vcnode.models.base import Moment, PodId, Reply, Request

MAX_STATS_INTERVAL_S = 240.0
"""Longest time between two samples of one who follows."""
MIN_STATS_INTERVAL_S = 0.1


class PodStatsOf(Request):
    """``pod.stats``."""

    pod_id: PodId
    guest: bool = True
    """Whether the guest agent is asked. Without, nobody is woken: the reply has ``vm`` only."""
    after: Moment | None = None
    """``time`` of a sample that the caller has: the reply is one taken ``interval_s`` after it, or later. To
    follow, ask again and again. Default: a sample taken now."""
    interval_s: float = Field(default=1.0, ge=MIN_STATS_INTERVAL_S, le=MAX_STATS_INTERVAL_S)
    """Seconds between ``after`` and the sample; without ``after`` it means nothing."""


class CpuStats(Reply):
    """CPU time, in microseconds."""

    usage_us: int
    """All of it."""
    user_us: int
    """In user mode."""
    system_us: int
    """In the kernel."""
    throttled_us: int | None = None
    """Time in which a limit held it up; None where there can be none."""


class BlockStats(Reply):
    """Block I/O of disks."""

    read_bytes: int
    """Read."""
    written_bytes: int
    """Written."""
    read_count: int
    """Requests to read."""
    write_count: int
    """Requests to write."""


class InterfaceStats(Reply):
    """What went through one network interface, as the pod sees it."""

    name: str
    """Its name in the guest."""
    received_bytes: int
    """What the pod got."""
    received_packets: int
    """Packets."""
    received_errors: int
    """Bad ones among them."""
    received_dropped: int
    """Those that were dropped."""
    sent_bytes: int
    """What the pod has sent."""
    sent_packets: int
    """Packets."""
    sent_errors: int
    """Those that could not be sent."""
    sent_dropped: int
    """Those that were dropped."""


def idle_interface(name: str) -> InterfaceStats:
    """An interface through which nothing went."""
    counters = ("bytes", "packets", "errors", "dropped")
    zeros = {f"{way}_{what}": 0 for way in ("received", "sent") for what in counters}
    return InterfaceStats.model_validate({"name": name, **zeros})


class VmStats(Reply):
    """What a VM takes of its host, as the host's kernel counts it: no guest has a say in it."""

    cpu: CpuStats
    """CPU of QEMU: of the guest's work and of its own."""
    thread_count: int
    """QEMU's threads."""
    resident_bytes: int
    """Memory of QEMU's process that is in RAM; what it shares with other VMs counts as its own."""
    pss_bytes: int | None = None
    """Its proportional share: what it shares with n others counts as an n-th. None: the kernel does not say,
    or was not asked."""
    guest_pss_bytes: int | None = None
    """The guest's memory in that."""
    overhead_bytes: int | None = None
    """The rest: what QEMU takes beyond the guest's memory."""
    cgroup_mem_bytes: int | None = None
    """Memory charged to the VM's cgroup; None without such a group or its memory controller."""
    read_bytes: int
    """What the host's disks had to give for it; not what came from the page cache."""
    written_bytes: int
    """What it has caused to be written to the host's disks."""
    interfaces: tuple[InterfaceStats, ...] = ()
    """The pod's interfaces, counted at the host's end."""


class GuestStats(Reply):
    """What goes on in a guest, by its own kernel: take it for the word of a stranger."""

    cpu: CpuStats
    """CPU time of all vCPUs, containers included."""
    mem_total_bytes: int
    """Memory that the guest's kernel manages."""
    mem_available_bytes: int
    """What could still be had without swapping."""
    pid_count: int
    """Processes and threads, the kernel's own included."""
    block: BlockStats
    """All its disks together."""
    interfaces: tuple[InterfaceStats, ...]
    """Its network interfaces but the loopback; the containers of a pod share them."""


class ContainerMemory(Reply):
    """Memory of a container, page cache and what it has written to memory included."""

    used_bytes: int
    """Charged to it."""
    working_set_bytes: int
    """The same without cached files that are easily dropped."""
    peak_bytes: int | None = None
    """The most that it ever used; None: the guest's kernel does not keep it."""
    limit_bytes: int | None = None
    """Its limit, if it has one."""
    oom_kill_count: int
    """Processes that were killed because it was reached."""


class ContainerStats(Reply):
    """What a container uses, by its cgroup in the guest."""

    container_id: str
    """The container; it need not run."""
    cpu: CpuStats
    """CPU time."""
    memory: ContainerMemory
    """Memory."""
    pid_count: int
    """Processes and threads."""
    pid_limit: int | None = None
    """Most that it may have, if that is limited."""
    block: BlockStats | None = None
    """I/O of disks; None: the guest's kernel does not count it by container."""


class PodStats(Reply):
    """Reply of ``pod.stats``."""

    pod_id: str
    """The pod."""
    node: str
    """Its node."""
    mock: bool = False
    """Whether it only pretends: then all numbers are made up."""
    time: Moment
    """When the sample was taken, by the node's clock."""
    vm: VmStats | None = None
    """The VM on its host; None: the hypervisor's driver does not tell."""
    guest: GuestStats | None = None
    """The guest; None when it was not asked, or could not answer because the pod is paused."""
    containers: tuple[ContainerStats, ...] = ()
    """Its containers, in the order of creation, under the same conditions as ``guest``."""
