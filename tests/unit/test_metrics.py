import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from vcnode.metrics import Metrics
from vcnode.pod_metrics import PodSample


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return Metrics(registry, ["pod.create", "pod.run"])


def value(registry, name, **labels):
    return registry.get_sample_value(name, labels)


def test_commands_are_counted_and_timed(metrics, registry):
    metrics.command_done("pod.create", "ok", 0.02)
    metrics.command_done("pod.create", "ok", 0.5)
    metrics.command_done("pod.create", "not_found", 0.001)
    assert value(registry, "vcnode_commands_total", verb="pod.create", code="ok") == 2
    assert value(registry, "vcnode_commands_total", verb="pod.create", code="not_found") == 1
    assert value(registry, "vcnode_command_duration_seconds_count", verb="pod.create") == 3
    assert value(registry, "vcnode_command_duration_seconds_bucket", verb="pod.create", le="0.03") == 2


def test_a_trace_is_the_exemplar_of_its_buckets(metrics, registry):
    trace = "0af7651916cd43dd8448eb211c80319c"
    metrics.command_done("pod.run", "ok", 0.02)
    metrics.command_done("pod.run", "ok", 0.02, f"00-{trace}-b7ad6b7169203331-01")
    metrics.phase("boot", 0.07, f"00-{trace}-b7ad6b7169203331-01")
    found = {
        (sample.name, sample.labels.get("le")): sample.exemplar.labels
        for family in openmetrics_families(openmetrics(registry).decode())
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert found == {
        ("vcnode_command_duration_seconds_bucket", "0.03"): {"trace_id": trace},
        ("vcnode_pod_start_phase_seconds_bucket", "0.1"): {"trace_id": trace},
    }
    assert trace not in generate_latest(registry).decode()  # the older format has no place for it


def test_made_up_verbs_make_no_series_of_their_own(metrics, registry):
    for number in range(100):
        metrics.command_done(f"made.up{number}", "invalid_argument", 0)
    assert value(registry, "vcnode_commands_total", verb="unknown", code="invalid_argument") == 100
    assert generate_latest(registry).count(b"made.up") == 0


def test_phases_sessions_and_events_are_counted(metrics, registry):
    metrics.phase("qemu", 0.07)
    metrics.session_lost()
    metrics.events_published(3)
    assert value(registry, "vcnode_pod_start_phase_seconds_sum", phase="qemu") == 0.07
    assert value(registry, "vcnode_guest_sessions_lost_total") == 1
    assert value(registry, "vcnode_events_published_total") == 3


@pytest.mark.parametrize(
    ("changes", "connected", "reconnects"),
    [
        ([], 0, 0),
        ([False], 0, 0),
        ([True], 1, 0),
        ([False, True], 1, 0),
        ([True, True], 1, 0),
        ([True, False], 0, 0),
        ([True, False, False, True], 1, 1),
        ([True, False, True, False, True], 1, 2),
    ],
)
def test_only_a_connection_that_came_back_is_a_reconnect(metrics, registry, changes, connected, reconnects):
    for change in changes:
        metrics.nats_connected(change)
    assert value(registry, "vcnode_nats_connected") == connected
    assert value(registry, "vcnode_nats_reconnects_total") == reconnects


def test_watched_numbers_are_read_at_each_scrape(metrics, registry):
    pods, waiting = {"running": 1, "failed": 0}, [5]
    metrics.watch(pods=lambda: pods, containers=lambda: {"stopped": 2}, unpublished=lambda: waiting[0])
    assert value(registry, "vcnode_pods", state="running") == 1
    assert value(registry, "vcnode_pods", state="failed") == 0
    pods["running"], waiting[0] = 7, 0
    assert value(registry, "vcnode_pods", state="running") == 7
    assert value(registry, "vcnode_containers", state="stopped") == 2
    assert value(registry, "vcnode_events_unpublished") == 0


def test_sessions_and_lost_output_are_read_at_each_scrape(metrics, registry):
    sessions, moved = {"exec": 1, "forward": 0}, [10]
    metrics.watch_streams(
        sessions=lambda: sessions,
        limit=256,
        received=lambda: moved[0],
        sent=lambda: 2 * moved[0],
        lost_output=lambda: 3 * moved[0],
    )
    sessions["exec"], moved[0] = 4, 100
    assert value(registry, "vcnode_sessions", kind="exec") == 4
    assert value(registry, "vcnode_sessions", kind="forward") == 0
    assert value(registry, "vcnode_sessions_limit") == 256
    assert value(registry, "vcnode_session_bytes_total", direction="received") == 100
    assert value(registry, "vcnode_session_bytes_total", direction="sent") == 200
    assert value(registry, "vcnode_log_lost_bytes_total") == 300


def test_pods_are_shown_beside_what_is_reckoned_for_them(metrics, registry):
    metrics.watch_pods(lambda: [PodSample("p1", {"overhead_bytes": 5.0})], overhead_bytes=7)
    assert value(registry, "vcnode_pod_overhead_memory_bytes", pod="p1") == 5
    assert value(registry, "vcnode_vm_overhead_budget_bytes") == 7


def test_build_says_what_runs(metrics, registry):
    metrics.runs(version="1.2", accelerator=None, mock=True)
    assert value(registry, "vcnode_build_info", version="1.2", accelerator="none", mock="true") == 1


def test_names_follow_the_conventions(metrics, registry):
    metrics.watch(pods=dict, containers=dict, unpublished=int)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert families
    for family in families:
        assert family.name.startswith("vcnode_")
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
    assert openmetrics(registry).endswith(b"# EOF\n")


def test_two_nodes_in_one_process_do_not_mix(metrics, registry):
    other = CollectorRegistry()
    Metrics(other, []).session_lost()
    assert value(registry, "vcnode_guest_sessions_lost_total") == 0
