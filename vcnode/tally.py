"""Counting commands, cheaply: a node answers tens of thousands a second, and is scraped now and then."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar


class Tally(Collector):
    """Numbers of commands by verb and outcome, and how long each verb took; put together at each scrape.

    Args:
        bounds: Upper bounds of the histogram's buckets in seconds, ascending, without infinity.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._ends: Counter[tuple[str, str]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._exemplars: dict[tuple[str, int], Exemplar] = {}

    def add(self, verb: str, code: str, seconds: float, trace_id: str | None = None) -> None:
        """Count one command; the last of each bucket that has a trace is its exemplar."""
        self._ends[verb, code] += 1
        if (buckets := self._buckets.get(verb)) is None:
            buckets = self._buckets[verb] = [0] * (len(self._bounds) + 1)
            self._seconds[verb] = 0.0
        index = bisect_left(self._bounds, seconds)  # a bucket includes its upper bound
        buckets[index] += 1
        if trace_id is not None:
            self._exemplars[verb, index] = Exemplar({"trace_id": trace_id}, seconds, time.time())
        self._seconds[verb] += seconds

    def collect(self) -> Iterator[Metric]:
        """The numbers as they are now."""
        commands = CounterMetricFamily(
            "vcnode_commands", "Commands answered, by verb and outcome.", labels=("verb", "code")
        )
        for (verb, code), number in self._ends.items():
            commands.add_metric((verb, code), number)
        yield commands
        durations = HistogramMetricFamily(
            "vcnode_command_duration_seconds",
            "Time from the arrival of a command to its reply.",
            labels=("verb",),
        )
        names = [str(float(bound)) for bound in self._bounds] + ["+Inf"]
        for verb, buckets in self._buckets.items():
            cumulative: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            for index, (name, count) in enumerate(zip(names, accumulate(buckets), strict=True)):
                exemplar = self._exemplars.get((verb, index))
                cumulative.append((name, count) if exemplar is None else (name, count, exemplar))
            durations.add_metric((verb,), cumulative, self._seconds[verb])
        yield durations
