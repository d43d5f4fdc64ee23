"""Whether a pod could run here, and how well. Pure: given what the node is and has, it makes the bid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from vcnode.models.fleet import Constraints, NodeStanding
from vcnode.models.node import Amount
from vcnode.models.pod import PodSpec
from vcnode.models.records import PodRecord
from vcnode.pods.capacity import minus

WEIGHTS: Mapping[str, float] = {"memory": 0.3, "cpu": 0.2, "disk": 0.1, "start": 0.3, "spread": 0.1}
"""What counts how much; they add up to 1."""
GOOD_START_MS = 1000.0
"""A start that takes so long is worth half of one that takes no time."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the node is and has at the moment of a bid."""

    standing: NodeStanding
    """Its labels, taints and state."""
    records: Mapping[str, PodRecord]
    """Its pods, by id."""
    total: Amount
    """What pods may have in all."""
    left: Amount
    """What of it can be had."""
    images: Set[str]
    """Names of the images at hand."""
    start_ms: float
    """What a start of the pod's size would take, the queue included."""


def obstacles(spec: PodSpec, constraints: Constraints, now: Situation) -> list[str]:
    """Why the pod cannot run here, but for room, one sentence each; empty when there is no such reason."""
    found: list[str] = []
    standing = now.standing
    if standing.state != "ready":
        found.append(f"The node is {standing.state}.")
    for key, value in constraints.labels.items():
        if standing.labels.get(key) != value:
            found.append(f"Label {key} is {standing.labels.get(key, 'not set')!r}, not {value!r}.")
    found += [
        f"Taint {taint} is not tolerated."
        for taint in standing.taints
        if taint not in constraints.tolerations
    ]
    if wanted := constraints.anti_affinity:
        rivals = [r.pod_id for r in now.records.values() if wanted.items() <= r.spec.labels.items()]
        if rivals:
            found.append(f"Pod {rivals[0]} has the labels that the pod keeps away from.")
    if spec.id in now.records:
        found.append(f"There is a pod {spec.id} already.")
    absent = sorted({c.image for c in spec.containers if c.image is not None} - now.images)
    found += [f"There is no image {name}." for name in absent]
    return found


def parts(spec: PodSpec, need: Amount, constraints: Constraints, now: Situation) -> dict[str, float]:
    """What the score is made of; see `WEIGHTS`. Each is between 0 and its weight, more is better."""
    after = minus(now.left, need)
    rates = {
        "memory": _rate(after.mem_mib, now.total.mem_mib),
        "cpu": _rate(after.vcpu_count, now.total.vcpu_count),
        "disk": _rate(after.disk_mib, now.total.disk_mib),
        "start": GOOD_START_MS / (GOOD_START_MS + now.start_ms),
        "spread": 1 / (1 + _alike(spec, constraints, now.records.values())),
    }
    return {name: round(WEIGHTS[name] * rate, 4) for name, rate in rates.items()}


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _alike(spec: PodSpec, constraints: Constraints, records: Iterable[PodRecord]) -> int:
    """How many pods here have the same value of the label that pods are spread by."""
    key = constraints.spread_by
    if key is None or key not in spec.labels:
        return 0
    return sum(record.spec.labels.get(key) == spec.labels[key] for record in records)
