"""What the node measures, as Prometheus metrics. Methods are named after what happened.

Names and units follow https://prometheus.io/docs/practices/naming/. Every label has few values: verbs are
those of the API (anything else counts as ``unknown``), codes those of ``errors.py``, never an id. What each
pod uses is in `pod_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vcnode.pod_metrics import PodMetrics, PodSample
from vcnode.tally import Tally
from vcnode.tracing import trace_id_of

_COMMAND_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_PHASE_BUCKETS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

Counts = Callable[[], Mapping[str, int]]


class Metrics:
    """All metrics of one node.

    Args:
        registry: Where they are registered; one `Metrics` each.
        verbs: The verbs that get a label of their own.
        on_phase: Also told the name and seconds of each phase of a start.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        verbs: Collection[str],
        *,
        on_phase: Callable[[str, float], None] | None = None,
    ) -> None:
        self._registry = registry
        self._on_phase = on_phase
        self._verbs = frozenset(verbs)
        self._tally = Tally(_COMMAND_BUCKETS)
        registry.register(self._tally)
        self._phase_seconds = Histogram(
            "vcnode_pod_start_phase_seconds",
            "Time that each phase of a pod's start took; 'total' is all of it.",
            ("phase",),
            buckets=_PHASE_BUCKETS,
            registry=registry,
        )
        self._events_published = Counter(
            "vcnode_events_published", "Events that JetStream has acknowledged.", registry=registry
        )
        self._connected = Gauge(
            "vcnode_nats_connected", "1 while there is a connection to NATS.", registry=registry
        )
        self._reconnects = Counter(
            "vcnode_nats_reconnects", "Times the connection to NATS came back.", registry=registry
        )
        self._connection: Literal["never", "up", "lost"] = "never"
        self._sessions_lost = Counter(
            "vcnode_guest_sessions_lost",
            "Sessions with guest agents that ended without being closed.",
            registry=registry,
        )
        self._restarts = Counter(
            "vcnode_restarts", "Starts that restart policies have made.", ("what",), registry=registry
        )
        for what in ("container", "pod"):
            self._restarts.labels(what)
        self._templates_made = Counter(
            "vcnode_templates_made", "VM templates that were booted and saved.", registry=registry
        )
        self._templates_broken = Counter(
            "vcnode_templates_broken",
            "VM templates that were dropped because a clone did not come up.",
            registry=registry,
        )
        self._spares_asked = Counter(
            "vcnode_pool_starts",
            "Starts of pods of a size that has a pool, by whether a spare VM waited for them.",
            ("result",),
            registry=registry,
        )
        self._spares_lost = Counter(
            "vcnode_pool_spares_lost",
            "Spare VMs that died while they waited, or did not answer when a pod took them.",
            registry=registry,
        )
        self._held = Gauge(
            "vcnode_host_objects", "What the node holds on its host, by kind.", ("kind",), registry=registry
        )
        self._orphans = Gauge(
            "vcnode_host_orphans",
            "What the last audit found on the host that is no pod's and could not be removed, by kind.",
            ("kind",),
            registry=registry,
        )
        self._reaped = Counter(
            "vcnode_host_orphans_reaped", "Orphans that audits have removed.", registry=registry
        )
        self._build = Info("vcnode_build", "What this node runs.", registry=registry)

    def command_done(self, verb: str, code: str, seconds: float, traceparent: str | None = None) -> None:
        """*verb* was answered with *code* (``ok`` or an error's) after *seconds*, in that trace."""
        known = verb if verb in self._verbs else "unknown"
        self._tally.add(known, code, seconds, trace_id_of(traceparent))

    def phase(self, name: str, seconds: float, traceparent: str | None = None) -> None:
        """A phase of a start took so long; its trace is an exemplar."""
        trace_id = trace_id_of(traceparent)
        exemplar = None if trace_id is None else {"trace_id": trace_id}
        self._phase_seconds.labels(name).observe(seconds, exemplar)
        if self._on_phase is not None:
            self._on_phase(name, seconds)

    def restarted(self, what: str) -> None:
        """A restart policy has started a container or a pod again."""
        self._restarts.labels(what).inc()

    def session_lost(self) -> None:
        """A session with a guest was lost."""
        self._sessions_lost.inc()

    def template_made(self) -> None:
        """A VM template was booted and saved."""
        self._templates_made.inc()

    def template_broken(self) -> None:
        """A VM template could not be used and was dropped."""
        self._templates_broken.inc()

    def spare_taken(self, found: bool) -> None:
        """A pod of a shape that has a pool came: there was a spare VM for it, or not."""
        self._spares_asked.labels("hit" if found else "miss").inc()

    def spare_lost(self) -> None:
        """A spare VM died while it waited, or did not answer when it was taken."""
        self._spares_lost.inc()

    def audited(self, *, held: Mapping[str, int], orphans: Mapping[str, int], freed: int) -> None:
        """An audit has counted what the host holds, and has removed so many orphans."""
        for gauge, counts in ((self._held, held), (self._orphans, orphans)):
            gauge.clear()
            for kind, count in counts.items():
                gauge.labels(kind).set(count)
        self._reaped.inc(freed)

    def events_published(self, count: int) -> None:
        """JetStream acknowledged so many more events."""
        self._events_published.inc(count)

    def nats_connected(self, connected: bool) -> None:
        """The connection came up or went down. Coming up again counts as a reconnect."""
        if connected and self._connection == "lost":
            self._reconnects.inc()
        if connected:
            self._connection = "up"
        elif self._connection == "up":
            self._connection = "lost"
        self._connected.set(connected)

    def runs(self, *, version: str, accelerator: str | None, mock: bool) -> None:
        """Say what this node is; to be called once that is known."""
        self._build.info(
            {"version": version, "accelerator": accelerator or "none", "mock": str(mock).lower()}
        )

    def watch_pool(self, *, ready: Callable[[], int], queued: Callable[[], int]) -> None:
        """Read the number of spare VMs that wait, and of starts that wait, at every scrape."""
        for name, text, count in (
            ("vcnode_pool_spares", "Spare VMs that wait for pods.", ready),
            ("vcnode_starts_queued", "Pods that wait to be started.", queued),
        ):
            Gauge(name, text, registry=self._registry).set_function(count)

    def watch_database(self, damaged: Callable[[], int]) -> None:
        """Read the number of damaged databases that were kept aside at every scrape."""
        Gauge(
            "vcnode_damaged_databases",
            "Damaged databases that were kept aside; look at them and delete them.",
            registry=self._registry,
        ).set_function(damaged)

    def watch_pods(self, samples: Callable[[], Sequence[PodSample]], *, overhead_bytes: int) -> None:
        """Show what each pod uses at every scrape.

        Args:
            samples: The last samples.
            overhead_bytes: What admission reckons for each VM besides its guest's memory.
        """
        self._registry.register(PodMetrics(samples))
        Gauge(
            "vcnode_vm_overhead_budget_bytes",
            "Memory that admission reckons for a VM besides its guest's (capacity.vm_overhead_mib).",
            registry=self._registry,
        ).set(overhead_bytes)

    def watch_streams(
        self,
        *,
        sessions: Counts,
        limit: int,
        received: Callable[[], int],
        sent: Callable[[], int],
        lost_output: Callable[[], int],
    ) -> None:
        """Read these at every scrape.

        Args:
            sessions: Open sessions by kind.
            limit: Most that may be open.
            received: Bytes that their clients have sent.
            sent: Bytes that were sent to their clients.
            lost_output: Bytes of containers' output that no log has.
        """
        self._registry.register(_Streams(sessions, received, sent, lost_output))
        Gauge(
            "vcnode_sessions_limit", "Sessions that may be open (limits.sessions).", registry=self._registry
        ).set(limit)

    def watch(self, *, pods: Counts, containers: Counts, unpublished: Callable[[], int]) -> None:
        """Read these at every scrape.

        Args:
            pods: Number of pods by state; states without pods should be there as zeros.
            containers: The same of containers.
            unpublished: Events that wait to be published.
        """
        self._registry.register(_Watched(pods, containers, unpublished))


class _Streams(Collector):
    """Sessions and logs, counted by those who carry them."""

    def __init__(
        self, sessions: Counts, received: Callable[[], int], sent: Callable[[], int], lost: Callable[[], int]
    ) -> None:
        self._sessions = sessions
        self._bytes = {"received": received, "sent": sent}
        self._lost = lost

    def collect(self) -> Iterator[Metric]:
        """Count now."""
        open_ = GaugeMetricFamily("vcnode_sessions", "Open sessions, by kind.", labels=("kind",))
        for kind, number in self._sessions().items():
            open_.add_metric((kind,), number)
        yield open_
        moved = CounterMetricFamily(
            "vcnode_session_bytes",
            "Bytes of the messages of sessions, by direction as the node sees it.",
            labels=("direction",),
        )
        for direction, count in self._bytes.items():
            moved.add_metric((direction,), count())
        yield moved
        yield CounterMetricFamily(
            "vcnode_log_lost_bytes",
            "Bytes of containers' output that were lost: written faster than taken, or for want of disk.",
            value=self._lost(),
        )


class _Watched(Collector):
    """Gauges that are counted when somebody looks."""

    def __init__(self, pods: Counts, containers: Counts, unpublished: Callable[[], int]) -> None:
        self._by_state = (
            ("vcnode_pods", "Pods that this node holds, by state.", pods),
            ("vcnode_containers", "Containers that this node holds, by state.", containers),
        )
        self._unpublished = unpublished

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Count now."""
        for name, text, counts in self._by_state:
            family = GaugeMetricFamily(name, text, labels=("state",))
            for state, number in counts().items():
                family.add_metric((state,), number)
            yield family
        yield GaugeMetricFamily(
            "vcnode_events_unpublished",
            "Events that wait to be acknowledged by JetStream.",
            value=self._unpublished(),
        )
