"""What each pod uses, as Prometheus metrics: at most `MAX_SERIES` series, however many containers it has.

Series are put together at each scrape from the last samples. They carry the pod's id and go with the pod.
Names and units follow https://prometheus.io/docs/practices/naming/ and, where one has the same meaning, the
names of cAdvisor and of the process collector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MAX_SERIES = 40
"""Most series of one pod."""
MAX_CONTAINERS = 5
"""Most containers of a pod with series of their own; with more, the last series are those of all the rest."""
THE_REST = "_rest"
"""Label of those; no container can be called that."""

Gauges = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PodSample:
    """What is known of a pod; all numbers by the names in `POD` and `CONTAINER`, unknown ones left out."""

    pod_id: str
    values: Gauges
    containers: Mapping[str, Gauges] = field(default_factory=dict)
    """By id, in the order of their creation."""


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    text: str
    counter: bool = False


POD = {
    "cpu_seconds": _Family("vcnode_pod_cpu_seconds", "CPU time of the pod's VM on its host.", counter=True),
    "resident_bytes": _Family(
        "vcnode_pod_resident_memory_bytes",
        "Memory of the pod's VM in the host's RAM; what it shares with other VMs counts in full.",
    ),
    "size_bytes": _Family("vcnode_pod_memory_size_bytes", "Memory that the pod's guest was given."),
    "overhead_bytes": _Family(
        "vcnode_pod_overhead_memory_bytes",
        "Memory (PSS) of the pod's VM besides its guest's; looked at once a minute.",
    ),
    "disk_read": _Family(
        "vcnode_pod_disk_read_bytes", "What the host's disks had to give for the pod.", counter=True
    ),
    "disk_written": _Family(
        "vcnode_pod_disk_written_bytes", "What the pod has caused to be written to disks.", counter=True
    ),
    "received_bytes": _Family(
        "vcnode_pod_network_receive_bytes", "Bytes that the pod has received.", counter=True
    ),
    "sent_bytes": _Family("vcnode_pod_network_transmit_bytes", "Bytes that the pod has sent.", counter=True),
    "received_packets": _Family(
        "vcnode_pod_network_receive_packets", "Packets that the pod has received.", counter=True
    ),
    "sent_packets": _Family(
        "vcnode_pod_network_transmit_packets", "Packets that the pod has sent.", counter=True
    ),
    "received_dropped": _Family(
        "vcnode_pod_network_receive_packets_dropped",
        "Packets to the pod that were dropped at its interfaces.",
        counter=True,
    ),
    "sent_dropped": _Family(
        "vcnode_pod_network_transmit_packets_dropped",
        "Packets of the pod that were dropped at its interfaces.",
        counter=True,
    ),
    "available_bytes": _Family(
        "vcnode_pod_guest_memory_available_bytes", "Memory that the pod's guest says is available."
    ),
}
"""Metrics of a pod, by name of the value."""

CONTAINER = {
    "cpu_seconds": _Family("vcnode_container_cpu_seconds", "CPU time, by its guest's cgroups.", counter=True),
    "working_set_bytes": _Family(
        "vcnode_container_memory_working_set_bytes",
        "Memory without cached files that are easily dropped, by its guest's cgroups.",
    ),
    "pids": _Family("vcnode_container_pids", "Processes and threads, by its guest's cgroups."),
    "disk_read": _Family(
        "vcnode_container_disk_read_bytes", "Bytes read from disks, by its guest's cgroups.", counter=True
    ),
    "disk_written": _Family(
        "vcnode_container_disk_written_bytes", "Bytes written to disks, by its guest's cgroups.", counter=True
    ),
}
"""Metrics of a container, by name of the value."""


def named(containers: Mapping[str, Gauges]) -> Iterator[tuple[str, Gauges]]:
    """The containers that get series of their own, and the sum of the others, if there are more."""
    ids = list(containers)
    own = ids if len(ids) <= MAX_CONTAINERS else ids[: MAX_CONTAINERS - 1]
    for container_id in own:
        yield container_id, containers[container_id]
    if rest := ids[len(own) :]:
        total: dict[str, float] = {}
        for container_id in rest:
            for name, value in containers[container_id].items():
                total[name] = total.get(name, 0.0) + value
        yield THE_REST, total


class PodMetrics(Collector):
    """Shows the last samples.

    Args:
        samples: Gives them.
    """

    def __init__(self, samples: Callable[[], Sequence[PodSample]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        """All series of all pods."""
        samples = self._samples()
        for name, family in POD.items():
            yield _filled(
                family,
                ("pod",),
                (((each.pod_id,), each.values[name]) for each in samples if name in each.values),
            )
        containers = [
            ((each.pod_id, container_id), values)
            for each in samples
            for container_id, values in named(each.containers)
        ]
        for name, family in CONTAINER.items():
            yield _filled(
                family,
                ("pod", "container"),
                ((labels, values[name]) for labels, values in containers if name in values),
            )


def _filled(
    family: _Family, labels: tuple[str, ...], found: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily | GaugeMetricFamily:
    make = CounterMetricFamily if family.counter else GaugeMetricFamily
    made: CounterMetricFamily | GaugeMetricFamily = make(family.name, family.text, labels=labels)
    for values, number in found:
        made.add_metric(values, number)
    return made
