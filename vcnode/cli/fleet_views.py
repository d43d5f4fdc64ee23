"""How the fleet looks on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from vcnode.cli.output import show_facts, show_table, state
from vcnode.client import Placement
from vcnode.models.fleet import Bid, DrainReport, NodeStanding
from vcnode.models.node import NodeLease
from vcnode.models.pod import PodState, PodStatus

_IDLE = frozenset({PodState.READY, PodState.STOPPED, PodState.FAILED})


def is_active(status: PodStatus) -> bool:
    """Whether the pod has a VM, or is about to."""
    return status.state not in _IDLE


def nodes(leases: Iterable[NodeLease]) -> None:
    """One line for each node."""
    show_table(
        ("NODE", "STATE", "PODS", "VCPUS", "MEMORY MIB", "DISK MIB", "ACCEL", "LABELS"),
        (
            (
                lease.node,
                state(lease.state),
                f"{lease.reserved.pods}/{lease.allocatable.pods}",
                f"{lease.reserved.vcpu_count}/{lease.allocatable.vcpu_count}",
                f"{lease.reserved.mem_mib}/{lease.allocatable.mem_mib}",
                f"{lease.reserved.disk_mib}/{lease.allocatable.disk_mib}",
                lease.accelerator or ("mock" if lease.mock else None),
                ",".join(f"{key}={value}" for key, value in sorted(lease.labels.items())),
            )
            for lease in leases
        ),
    )


def pods(found: Iterable[PodStatus]) -> None:
    """One line for each pod."""
    show_table(
        ("NODE", "POD", "STATE", "CONTAINERS", "MEMORY MIB", "REASON"),
        (
            (
                status.node,
                status.pod_id,
                state(status.state),
                f"{sum(c.state == 'running' for c in status.containers)}/{len(status.containers)}",
                status.resources.mem_size_mib,
                status.reason,
            )
            for status in found
        ),
    )


def bids(found: Iterable[Bid]) -> None:
    """One line for each node that answered."""
    show_table(
        ("NODE", "ABLE", "SCORE", "START MS", "PARTS", "REASONS"),
        (
            (
                bid.node,
                "yes" if bid.able else "no",
                bid.score if bid.able else None,
                bid.predicted_start_ms,
                " ".join(f"{name}={value}" for name, value in bid.parts.items()),
                " ".join(bid.reasons),
            )
            for bid in found
        ),
    )


def placed(placement: Placement) -> None:
    """Where a pod runs, and who refused it."""
    show_facts(
        (
            ("pod", placement.pod.pod_id),
            ("node", placement.node),
            ("state", state(placement.pod.state)),
            ("score", placement.bid.score),
            *((f"refused by {node}", why) for node, why in placement.refused.items()),
        )
    )


def standing(reply: NodeStanding) -> None:
    """What schedulers see of a node."""
    show_facts(
        (
            ("node", reply.node),
            ("state", state(reply.state)),
            ("reason", reply.reason),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(reply.labels.items()))),
            ("taints", ", ".join(reply.taints)),
        )
    )


def drained(report: DrainReport) -> None:
    """What became of the pods of a node."""
    show_facts(
        (
            ("node", f"{report.node} is cordoned"),
            ("stopped", ", ".join(report.stopped)),
            ("killed", ", ".join(report.forced)),
            ("failed", ", ".join(report.failed)),
        )
    )
