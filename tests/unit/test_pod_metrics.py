"""What each pod uses, as metrics: which series there are, and how many at most."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

from vcnode.pod_metrics import CONTAINER, MAX_CONTAINERS, MAX_SERIES, POD, PodMetrics, PodSample


def registry(*samples: PodSample) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(PodMetrics(lambda: samples))
    return made


def everything(pod_id: str, containers: int) -> PodSample:
    """A pod of which all is known."""
    return PodSample(
        pod_id,
        dict.fromkeys(POD, 1.0),
        {f"c{number}": dict.fromkeys(CONTAINER, 2.0) for number in range(containers)},
    )


def series(made: CollectorRegistry, write: object = generate_latest) -> Sequence[str]:
    text = write(made).decode()  # type: ignore[operator]
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_no_pod_has_more_than_40_series_whatever_is_in_it() -> None:
    for containers in (0, 1, MAX_CONTAINERS, MAX_CONTAINERS + 1, 100):
        for write in (generate_latest, openmetrics):
            assert len(series(registry(everything("p1", containers)), write)) <= MAX_SERIES == 40


def test_containers_beyond_the_bound_are_summed() -> None:
    made = registry(everything("p1", MAX_CONTAINERS + 3))

    def pids(container: str) -> float | None:
        return made.get_sample_value("vcnode_container_pids", {"pod": "p1", "container": container})

    assert [pids(f"c{number}") for number in range(MAX_CONTAINERS)] == [2.0] * (MAX_CONTAINERS - 1) + [None]
    assert pids("_rest") == 8.0


def test_what_is_not_known_has_no_series() -> None:
    made = registry(PodSample("p1", {"cpu_seconds": 1.5}, {"c1": {"pids": 3.0}}), PodSample("p2", {}))
    assert series(made) == [
        'vcnode_pod_cpu_seconds_total{pod="p1"} 1.5',
        'vcnode_container_pids{container="c1",pod="p1"} 3.0',
    ]
