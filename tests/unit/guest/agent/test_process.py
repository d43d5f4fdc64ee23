"""What a request's process means."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.guest.agent import capabilities, limits, process, users
from vcnode.guest.agent.failures import Failure, printable
from vcnode.guest.agent.params import Params


def spec(**fields: Any) -> process.ProcessSpec:
    return process.ProcessSpec(Params({"args": ["true"]} | fields, "process"))


def test_what_is_missing_has_a_default() -> None:
    found = spec()
    assert (found.args, found.workdir, found.user, found.group) == ((b"true",), "/", "0", None)
    assert (found.envs, found.rlimits, found.capabilities, found.no_new_privileges) == ({}, (), 0, True)


def test_of_two_variables_the_later_one_wins() -> None:
    assert spec(envs=[["A", "1"], ["A", "2"]]).envs == {b"A": b"2"}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"args": []}, "process.args"),
        ({"args": "true"}, "process.args"),
        ({"args": [1]}, "process.args[0]"),
        ({"args": ["x" * 131_073]}, "process.args[0]"),
        ({"args": ["x"] * 4097}, "process.args"),
        ({"envs": [["", "x"]]}, "process.envs[0]"),
        ({"envs": [["A", 1]]}, "process.envs[0]"),
        ({"envs": {"A": "1"}}, "process.envs"),
        ({"no_new_privileges": 1}, "process.no_new_privileges"),
        ({"capabilities": ["chown"]}, "process.capabilities"),
        ({"rlimits": [["nofile", True, 1]]}, "process.rlimits[0]"),
        ({"rlimits": [["nofile", -1, 1]]}, "process.rlimits[0]"),
        ({"rlimits": [["nofile", 0, 1 << 63]]}, "process.rlimits[0]"),
        ({"workdir": "x"}, "process.workdir"),
        ({"workdir": None}, "process.workdir"),
        ({"more": None}, "process.more"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(Failure) as caught:
        spec(**fields)
    assert caught.value.code == "invalid_argument"
    assert caught.value.message.startswith(f"{path}: ")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4))
def test_any_json_in_a_field_is_taken_or_refused(value: Any) -> None:
    codes = set()
    for field in ("args", "envs", "workdir", "user", "group", "rlimits", "capabilities"):
        try:
            spec(**{field: value})
        except Failure as failure:
            codes.add(failure.code)
    assert codes <= {"invalid_argument"}


def test_unlimited_is_minus_one() -> None:
    assert spec(rlimits=[["core", 0, -1], ["nofile", -1, -1]]).rlimits == ((4, 0, -1), (7, -1, -1))
    assert limits.NOFILE == 7


def test_the_environment_has_defaults_that_can_be_replaced() -> None:
    found = process.environment({b"PATH": b"/x", b"A": b"b"}, b"/home/ann", "box")
    assert found == {b"PATH": b"/x", b"A": b"b", b"HOME": b"/home/ann", b"HOSTNAME": b"box"}


@pytest.mark.parametrize(
    ("program", "path", "files"),
    [
        (b"ls", b"/bin:/usr/bin", (b"/bin/ls", b"/usr/bin/ls")),
        (b"ls", b":/bin", (b"./ls", b"/bin/ls")),
        (b"/ls", b"/bin", (b"/ls",)),
        (b"./ls", b"/bin", (b"./ls",)),
        (b"", b"/bin", ()),
    ],
)
def test_where_a_program_is_looked_for(program: bytes, path: bytes, files: tuple[bytes, ...]) -> None:
    assert process.candidates(program, path) == files


def test_exit_codes_are_those_of_a_shell() -> None:
    assert process.exit_code(3 << 8) == 3
    assert process.exit_code(int(signal.SIGKILL)) == 137
    assert process.exit_code(int(signal.SIGSEGV) | 0x80) == 139  # with a core dump


def test_a_plan_holds_what_the_child_needs(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("ann:x:7:8::/home/ann:\n")
    plan = process.Plan(spec(user="ann", capabilities=["CAP_KILL"]), str(tmp_path), "box")
    assert (plan.identity.uid, plan.identity.gid) == (7, 8)
    assert plan.env[b"HOME"] == b"/home/ann"
    assert set(plan.dropped_capabilities) == set(range(len(capabilities.NAMES))) - {5}
    with pytest.raises(Failure):
        process.Plan(spec(user="eve"), str(tmp_path), "box")


def test_a_plan_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Failure):
        process.Plan(spec(user="eve"), str(tmp_path), "box")
    assert os.listdir("/proc/self/fd") == before


def test_capabilities_by_name_and_number() -> None:
    assert capabilities.mask(["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"]) == 1 | 1 << 40
    assert capabilities.numbers(0b1011) == (0, 1, 3)
    # The set that Docker and containerd give, as seen in CapEff of a container.
    assert capabilities.mask(capabilities.DEFAULT) == 0x00000000A80425FB


@pytest.mark.parametrize(
    ("name", "shown"), [(b"a\n\xff", "a?\ufffd"), ("x" * 300, "x" * 256 + "…"), ("ä", "ä")]
)
def test_names_are_shown_on_one_line(name: object, shown: str) -> None:
    assert printable(name) == shown


def test_a_user_is_looked_up_again_only_when_the_files_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    passwd = tmp_path / "etc/passwd"
    looked_up: list[str] = []
    resolve = users.resolve_in
    monkeypatch.setattr(users, "resolve_in", lambda *args: looked_up.append(args[1]) or resolve(*args))
    monkeypatch.setattr(users, "_SETTLED_NS", -(10**12))
    ann = spec(user="ann")
    passwd.write_text("ann:x:7:7::/home/ann:\n")
    assert [process.Plan(ann, str(tmp_path), "h").identity.uid for _ in range(3)] == [7, 7, 7]
    assert looked_up == ["ann"]
    passwd.write_text("ann:x:80:80::/home/ann:\n")
    assert process.Plan(ann, str(tmp_path), "h").identity.uid == 80
    assert looked_up == ["ann"] * 2
