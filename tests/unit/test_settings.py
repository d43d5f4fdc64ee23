import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from vcnode.models.pod import AgentType
from vcnode.settings import Settings, default_node_name


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("VCNODE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(
        'node_name = "file"\nstop_grace_s = 1\n[nats]\nurl = "nats://file"\nprefix = "fromfile"\n'
    )
    return path


def test_defaults_stand_alone():
    settings = Settings.load()
    assert settings.nats.url == "nats://127.0.0.1:4222"
    assert settings.state_dir == Path("/var/lib/vcnode")


def test_file_beats_defaults(file):
    settings = Settings.load(file)
    assert (settings.node_name, settings.stop_grace_s, settings.nats.url) == ("file", 1, "nats://file")


def test_environment_beats_the_file_and_leaves_the_rest_of_its_group(file, monkeypatch):
    monkeypatch.setenv("VCNODE_NODE_NAME", "env")
    monkeypatch.setenv("VCNODE_NATS_URL", "nats://env")
    monkeypatch.setenv("VCNODE_QEMU_BOOT_TIMEOUT_S", "7")
    settings = Settings.load(file)
    assert (settings.node_name, settings.nats.url, settings.nats.prefix) == ("env", "nats://env", "fromfile")
    assert settings.qemu.boot_timeout_s == 7


def test_flags_beat_everything_but_none_is_no_flag(file, monkeypatch):
    monkeypatch.setenv("VCNODE_NODE_NAME", "env")
    settings = Settings.load(file, node_name="flag", log_level=None, nats={"url": "nats://flag"})
    assert (settings.node_name, settings.log_level) == ("flag", "info")
    assert (settings.nats.url, settings.nats.prefix) == ("nats://flag", "fromfile")


def test_lists_come_from_the_environment_as_json(monkeypatch):
    monkeypatch.setenv("VCNODE_ALLOWED_ROOTS", '["/a", "/b"]')
    assert Settings.load().allowed_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("nodename = 'x'", "nodename"),
        ("[nats]\nurls = 'x'", "nats.urls"),
        ("node_name = 'Upper'", "node_name"),
        ("[limits]\npods = 0", "limits.pods"),
        ("[nats]\nprefix = 'a.b'", "nats.prefix"),
        ("hypervisor = 'xen'", "hypervisor"),
    ],
)
def test_mistakes_name_the_setting(tmp_path, text, where):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValidationError) as caught:
        Settings.load(tmp_path / "bad.toml")
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [where]


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.toml"):
        Settings.load(tmp_path / "nothing.toml")


def test_one_load_does_not_change_the_next(file):
    Settings.load(file)
    assert Settings.load().nats.url == "nats://127.0.0.1:4222"


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError):
        Settings.load().node_name = "x"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, AgentType.NATIVE),
        ({"hypervisor": "mock"}, AgentType.MOCK),
        ({"hypervisor": "mock", "agent": "noop"}, AgentType.NOOP),
        ({"agent": "noop"}, AgentType.NOOP),
    ],
)
def test_agent_follows_the_hypervisor_unless_it_is_set(given, expected):
    assert Settings.load(**given).agent_type is expected


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Host1.example.org", "host1"),
        ("under_score", "under_score"),
        ("-odd.", "odd"),
        ("...", "node"),
        ("a" * 70, "a" * 64),
    ],
)
def test_node_name_is_made_from_the_hosts(monkeypatch, host, name):
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert default_node_name() == name
    assert Settings.load().node_name == name


def test_host_name_cut_at_a_dash_still_makes_a_node_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "a" * 63 + "-b")
    assert Settings.load().node_name == "a" * 63


def test_a_family_of_pods_addresses_can_be_left_out(tmp_path: Path, monkeypatch):
    path = tmp_path / "node.toml"
    path.write_text('[bridge]\nsubnet6 = ""\nmtu = 576\n')
    assert Settings.load(path).bridge.subnet6 is None
    monkeypatch.setenv("VCNODE_BRIDGE_SUBNET4", "")
    assert Settings.load().bridge.subnet4 is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mtu": 1279}, "at least 1280 with IPv6"),
        ({"mtu": 575, "subnet6": ""}, "greater than or equal to 576"),
        ({"subnet4": "10.0.0.0/29"}, "too small for pods"),
        ({"subnet6": "fd00::/125"}, "too small for pods"),
    ],
)
def test_what_no_pod_could_be_connected_with_is_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        Settings.load(bridge=values)
