"""Rules and dashboards, by a real promtool and a real Prometheus that has scraped a real node."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import mock_settings
from tests.support.nats import NatsServer
from vcnode.client import Client
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.node import Node, running
from vcnode.settings import NatsSettings, StatsSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/vcnode"
RULES = CHART / "rules/vcnode.yaml"
WAIT_S = 50
POLL_S = 0.1
EVERY_SECOND = StatsSettings(guest_interval_s=1)


def tool(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is missing: run dev/setup --tests"
    return found


def promtool(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("promtool"), *args], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def queries(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))


def test_the_rules_are_valid() -> None:
    result = promtool("check", "rules", str(RULES))
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_rules_do_what_they_are_for() -> None:
    result = promtool("test", "rules", str(Path(__file__).parent / "rules_test.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_in_the_handbook() -> None:
    handbook = (ROOT / "docs/operations.md").read_text()
    for rule in rules():
        if "alert" in rule:
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
            assert f"### {rule['alert']}\n" in handbook


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    for dashboard in DASHBOARDS:
        panels = json.loads(dashboard.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            grid = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(grid["x"], grid["x"] + grid["w"])
                for y in range(grid["y"], grid["y"] + grid["h"])
            }
            assert not taken & cells, f"{dashboard.name}: {panel['title']}"
            assert max(x for x, _ in cells) < 24
            taken |= cells


class Prometheus:
    """A server on a free loopback port that scrapes one target."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self.base}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)

    def query(self, text: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/api/v1/query", query=text)["data"]["result"]
        return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
async def node(short_dir: Path, nats_server: NatsServer) -> AsyncIterator[Node]:
    """A node that has run and deleted a pod, and holds another."""
    settings = mock_settings(short_dir / "node", nats_server.url)
    async with (
        running(
            settings.model_copy(update={"metrics_address": "127.0.0.1:0", "stats": EVERY_SECOND})
        ) as node,
        await Client.connect(NatsSettings(url=nats_server.url)) as client,
    ):
        handle = client.node(settings.node_name)
        await node.connection.wait_connected()
        await handle.image_import("busybox", str(settings.allowed_roots[0]))
        container = ContainerSpec(id="main", image="busybox", cmd=Cmd(args=("sleep", "600")))
        for pod_id in ("gone", "kept"):
            await handle.pod_run(PodSpec(id=pod_id, containers=(container,)))
        await handle.pod_delete("gone", force=True)
        yield node


@pytest.fixture
async def prometheus(node: Node, short_dir: Path) -> AsyncIterator[Prometheus]:
    """A Prometheus with the chart's rules that has scraped the node."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "vcnode", "static_configs": [{"targets": [node.http_address]}]}],
    }
    (short_dir / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (short_dir / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            tool("prometheus"),
            f"--config.file={short_dir}/prometheus.yml",
            f"--storage.tsdb.path={short_dir}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
    try:
        server = Prometheus(port)
        # It has no way to tell that it is ready, nor that it has scraped: both are asked for.
        async with asyncio.timeout(WAIT_S):
            while True:
                assert process.returncode is None, (short_dir / "prometheus.log").read_text()
                try:
                    if await asyncio.to_thread(server.query, "count_over_time(vcnode_build_info[1m]) >= 3"):
                        break
                except OSError:
                    pass
                await asyncio.sleep(POLL_S)
        yield server
    finally:
        process.kill()
        await process.wait()


def exposed(node: Node) -> str:
    with urllib.request.urlopen(f"http://{node.http_address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def names(text: str) -> set[str]:
    """Every name that a scrape can give, series or not: a label that has not been needed yet has none."""
    found: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


@pytest.mark.nats
async def test_every_query_finds_what_the_node_tells(node: Node, prometheus: Prometheus) -> None:
    known = names(await asyncio.to_thread(exposed, node))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    texts = [text for dashboard in DASHBOARDS for text in queries(dashboard)]
    texts += [rule["expr"] for rule in rules()]
    for text in texts:
        missing = set(re.findall(r"\bvcnode[_:][a-z0-9_:]+", text)) - recorded - known
        assert not missing, f"{text}: no such metrics: {missing}"
        made = text.replace("$__rate_interval", "1m").replace("$instance", str(node.http_address))
        await asyncio.to_thread(prometheus.query, made)  # raises when it is no query
    for shown, label, value in (
        ('vcnode_pods{state="running"}', "state", "running"),
        ("sum by (verb) (vcnode_commands_total)", "verb", "pod.run"),
        ('vcnode_pod_start_phase_seconds_count{phase="total"}', "phase", "total"),
        ("vcnode_pod_memory_size_bytes", "pod", "kept"),
        ('vcnode_container_pids{pod="kept"}', "container", "main"),
    ):
        found = await asyncio.to_thread(prometheus.query, shown)
        assert value in {series["metric"][label] for series in found}


@pytest.mark.nats
async def test_names_and_units_are_as_prometheus_wants_them(node: Node) -> None:
    text = await asyncio.to_thread(exposed, node)
    result = await asyncio.to_thread(lambda: promtool("check", "metrics", stdin=text))
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
