from __future__ import annotations

from pathlib import Path

import pytest

from vcnode.cli.exits import UsageError
from vcnode.cli.settings import given, load


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VCNODE_NATS_URL", "VCNODE_NATS_PREFIX", "VCNODE_NODE_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_flags_that_were_not_given_leave_groups_alone() -> None:
    assert given({"a": None, "b": {"c": None}, "d": {"e": 1, "f": None}, "g": 0}) == {"d": {"e": 1}, "g": 0}


def test_a_flag_of_a_group_leaves_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text('node_name = "n"\n[nats]\nurl = "nats://file:1"\nuser = "u"\nprefix = "f"\n')
    monkeypatch.setenv("VCNODE_NATS_PREFIX", "env")

    settings = load(file, nats={"url": "nats://flag:1", "prefix": None})

    assert (settings.nats.url, settings.nats.user, settings.nats.prefix) == ("nats://flag:1", "u", "env")


def test_variables_of_the_command_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCNODE_NODE", "n")
    monkeypatch.setenv("VCNODE_OUTPUT", "json")
    monkeypatch.setenv("VCNODE_TEST_NATS", "binary")

    load(None)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("nope = 1\n", "nope"),
        ("[nats]\nprefix = 'a.b'\n", "nats.prefix"),
        ("[limits]\npods = 'x'\n", "limits.pods"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, field: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text)

    with pytest.raises(UsageError) as caught:
        load(file)

    assert [v["field"] for v in caught.value.details["violations"]] == [field]


def test_files_that_are_not_toml_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    with pytest.raises(UsageError, match="No settings file"):
        load(file)
    file.write_text("{")
    with pytest.raises(UsageError, match="is not TOML"):
        load(file)
