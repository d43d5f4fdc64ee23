"""The Helm chart, by a real helm, against Kubernetes' own schemas and the node's settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from vcnode.settings import Settings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/vcnode"
HERE = Path(__file__).parent
HELM = Path(sys.prefix) / "bin/helm"
SETS = sorted(path.stem for path in (HERE / "values").glob("*.yaml"))
KUBERNETES = ("1.25", "1.31", "1.37")
CUSTOM = {"PodMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, which Kubernetes has no schemas of."""


def helm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *args], capture_output=True, text=True, timeout=60, check=False)


def render(values: str, *more: str) -> str:
    result = helm(
        "template", "test", str(CHART), "--namespace", "vms", "-f", str(HERE / f"values/{values}.yaml"), *more
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def objects(rendered: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(rendered) if found]


@pytest.mark.parametrize("values", SETS)
def test_it_lints(values: str) -> None:
    result = helm("lint", "--strict", str(CHART), "-f", str(HERE / f"values/{values}.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("values", SETS)
def test_it_renders_what_was_agreed(values: str) -> None:
    """After a change that is meant: UPDATE_GOLDEN=1 pytest tests/deploy, and read the diff."""
    golden = HERE / f"golden/{values}.yaml"
    rendered = render(values)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text()


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", SETS)
def test_kubernetes_would_take_it(values: str, version: str) -> None:
    for found in objects(render(values)):
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(found, version, strict=True)


def test_a_wrong_object_would_be_found() -> None:
    [daemon_set] = [found for found in objects(render("default")) if found["kind"] == "DaemonSet"]
    daemon_set["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(daemon_set, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("values", SETS)
def test_the_node_takes_the_settings(values: str) -> None:
    [config] = [
        found["data"]["node.toml"]
        for found in objects(render(values))
        if found["kind"] == "ConfigMap" and "node.toml" in found["data"]
    ]
    given = tomllib.loads(config)
    settings = Settings(node_name="n1", **given)
    assert settings.metrics_address.startswith("0.0.0.0:")
    assert settings.nats.url == given["nats"]["url"]


def test_every_mount_has_its_volume_and_every_volume_its_mount() -> None:
    for values in SETS:
        for found in objects(render(values)):
            spec = found.get("spec", {})
            pod = spec.get("template", {}).get("spec") or (spec if found["kind"] == "Pod" else None)
            if pod:
                mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
                assert mounts == {volume["name"] for volume in pod["volumes"]}, values


def test_pods_outlive_the_daemon_set() -> None:
    [daemon_set] = [found for found in objects(render("default")) if found["kind"] == "DaemonSet"]
    pod = daemon_set["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert pod["hostPID"] is True
    assert daemon_set["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert mounts["cgroup"]["mountPath"] == "/sys/fs/cgroup"
    assert all(mounts[name]["mountPropagation"] == "Bidirectional" for name in ("state", "run", "netns"))


def test_the_account_has_no_rights() -> None:
    kinds = {found["kind"] for values in SETS for found in objects(render(values))}
    assert not {kind for kind in kinds if "Role" in kind}


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ("nats.url=http://x", "url"),
        ("image.tga=1", "tga"),
        ("metrics.port=0", "port"),
        ("host.runDir=run", "runDir"),
        ("nats.prefix=a.b", "prefix"),
    ],
)
def test_wrong_values_are_refused_by_name(bad: str, word: str) -> None:
    result = helm("template", "test", str(CHART), "--set", bad)
    assert result.returncode != 0
    assert word in result.stderr


def test_every_value_has_a_comment() -> None:
    """A comment stands above each key, or above the key before it when two belong together."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    bare = [
        line
        for number, line in enumerate(lines)
        if re.match(r" *[a-zA-Z]+: .", line)
        and not any(above.strip().startswith("#") for above in lines[max(0, number - 2) : number])
    ]
    assert bare == ["    cpu: 100m", "    memory: 256Mi"]  # what they mean is Kubernetes' own
