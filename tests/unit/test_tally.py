"""The counts of commands are the same as those of the library's own counters."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from vcnode.tally import Tally

BOUNDS = (0.001, 0.1, 1.0)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.0011, 0.1, 1.0, 2.5, 400.0])
def test_a_tally_shows_what_the_librarys_counters_show(seconds: float) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = Tally(BOUNDS)
    ours.register(tally)
    counter = Counter(
        "vcnode_commands", "Commands answered, by verb and outcome.", ("verb", "code"), registry=theirs
    )
    histogram = Histogram(
        "vcnode_command_duration_seconds",
        "Time from the arrival of a command to its reply.",
        ("verb",),
        buckets=BOUNDS,
        registry=theirs,
    )
    for verb, code in (("pod.run", "ok"), ("pod.run", "ok"), ("pod.run", "aborted"), ("pod.stop", "ok")):
        tally.add(verb, code, seconds)
        counter.labels(verb, code).inc()
        histogram.labels(verb).observe(seconds)

    def samples(registry: CollectorRegistry) -> list[str]:
        lines = generate_latest(registry).decode().splitlines()
        return sorted(line for line in lines if "_created" not in line)

    assert samples(ours) == samples(theirs)
