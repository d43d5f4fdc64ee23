"""The commands that a mock guest understands."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vcnode.drivers.agent.mock.shell import Cat, Program, Sleep, Write, compile_process
from vcnode.errors import InvalidArgumentError
from vcnode.models.vm import GuestProcess


def program(*args: str, **process: Any) -> Program:
    return compile_process(GuestProcess(args=args, **process), "box")


def script(text: str) -> Program:
    return program("sh", "-c", text)


def written(found: Program) -> tuple[bytes, bytes]:
    """All that is written to stdout and to stderr."""
    writes = [step for step in found.steps if isinstance(step, Write)]
    out, err = (b"".join(w.data for w in writes if w.to == name) for name in ("stdout", "stderr"))
    return out, err


@pytest.mark.parametrize(
    ("args", "stdout", "exit_code"),
    [
        (("true",), b"", 0),
        (("/bin/true",), b"", 0),
        (("/usr/bin/false",), b"", 1),
        (("exit", "258"), b"", 2),
        (("exit", "x"), b"", 2),
        (("echo",), b"\n", 0),
        (("echo", "-n", "a", "b"), b"a b", 0),
        (("echo", "\udcff"), b"\xff\n", 0),
        (("pwd",), b"/\n", 0),
        (("hostname",), b"box\n", 0),
        (("id",), b"uid=0 gid=0\n", 0),
    ],
    ids=str,
)
def test_simple_commands(args: tuple[str, ...], stdout: bytes, exit_code: int) -> None:
    found = program(*args)
    assert (written(found), found.exit_code) == ((stdout, b""), exit_code)


@pytest.mark.parametrize(
    ("text", "stdout", "stderr", "exit_code"),
    [
        ("", b"", b"", 0),
        ("echo a; echo b", b"a\nb\n", b"", 0),
        ("exit 3; echo never", b"", b"", 3),
        ("false && echo a", b"", b"", 1),
        ("false && echo a || echo b", b"b\n", b"", 0),
        ("true || echo a; echo b", b"b\n", b"", 0),
        ("echo 'a ; b'", b"a ; b\n", b"", 0),
        ("echo a >&2", b"", b"a\n", 0),
        ("echo a 1>&2; false", b"", b"a\n", 1),
        ("sh -c 'exit 4' || echo $?", b"$?\n", b"", 0),
        ("sh -c 'exit 4'; echo on", b"on\n", b"", 0),
    ],
)
def test_scripts(text: str, stdout: bytes, stderr: bytes, exit_code: int) -> None:
    found = script(text)
    assert (written(found), found.exit_code) == ((stdout, stderr), exit_code)


@pytest.mark.parametrize(
    ("args", "exit_code"),
    [
        (("nosuch",), 127),
        (("./true",), 127),
        (("sleep",), 1),
        (("sleep", "long"), 1),
        (("sleep", "-1"), 1),
        (("sleep", "nan"), 1),
        (("cat", "/etc/passwd"), 1),
        (("sh", "script.sh"), 2),
        (("sh", "-c", "echo 'open"), 2),
    ],
    ids=str,
)
def test_what_cannot_be_done_says_so_on_stderr(args: tuple[str, ...], exit_code: int) -> None:
    found = program(*args)
    stdout, stderr = written(found)
    assert (stdout, found.exit_code) == (b"", exit_code)
    assert stderr.endswith(b"\n")


def test_sleep_and_cat_are_steps() -> None:
    assert program("sleep", "0.5").steps == (Sleep(0.5),)
    assert program("sleep", "infinity").steps == (Sleep(math.inf),)
    assert program("cat").steps == program("sh").steps == (Cat(),)
    assert script("cat >&2").steps == (Cat("stderr"),)


def test_env_shows_what_was_given_over_the_defaults() -> None:
    stdout, _ = written(program("env", envs=(("HOME", "/h"), ("A", "1"))))
    assert {b"HOME=/h", b"A=1", b"HOSTNAME=box"} < set(stdout.splitlines())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "nosuch"),
        ("group", "nosuch"),
        ("supplementary_groups", ("nosuch",)),
        ("user", "-1"),
        ("user", "4294967296"),
    ],
)
def test_unknown_users_and_groups_are_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        program("true", **{field: value})
    assert caught.value.details["violations"][0]["field"] == field


def test_known_users_have_numbers() -> None:
    assert written(program("id", user="nobody", group="root"))[0] == b"uid=65534 gid=0\n"
