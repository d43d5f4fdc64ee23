from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
import typer

import vcnode.cli.app  # noqa: F401 -- adds commands of other files to the groups
from tests.support.cli import run
from vcnode.cli import app, containers, images, nodes, pods, sessions  # noqa: F401 -- app fills the groups
from vcnode.cli.command import Options, Output, execute
from vcnode.cli.exits import Exit, UsageError
from vcnode.errors import HypervisorError, NotFoundError
from vcnode.models.commands import COMMANDS

GROUPS: dict[str, typer.Typer] = {
    "pod": pods.app,
    "container": containers.app,
    "image": images.app,
    "node": nodes.app,
    "session": sessions.app,
}


def ends(with_: BaseException | int | None) -> Callable[[], Awaitable[int | None]]:
    async def work() -> int | None:
        if isinstance(with_, BaseException):
            raise with_
        return with_

    return work


@pytest.mark.parametrize(
    ("end", "failure", "code"),
    [
        (None, None, 0),
        (7, None, 7),
        (NotFoundError("No."), None, 3),
        (NotFoundError("No."), Exit.EXEC_FAILED, 125),
        (UsageError("No."), None, 2),
        (UsageError("No."), Exit.EXEC_FAILED, 2),
        (HypervisorError("No."), None, 1),
        (KeyboardInterrupt(), None, 130),
        (KeyboardInterrupt(), Exit.EXEC_FAILED, 130),
    ],
    ids=str,
)
def test_how_work_ends_is_the_exit_code(
    end: BaseException | int | None, failure: Exit | None, code: int
) -> None:
    assert execute(ends(end), failure=failure) == code


def test_errors_that_nobody_expected_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        execute(ends(ZeroDivisionError()))


def test_an_error_of_the_guest_cannot_write_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    execute(ends(HypervisorError("It said \x1b]0;hi\x07.")), output=Output.TABLE)

    assert capsys.readouterr().err == "error: It said \\x1b]0;hi\\x07.\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = """
import sys
from vcnode.cli.command import execute
async def work():
    while True:
        print("x" * 1000, flush=True)
sys.exit(execute(work))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_options_behind_a_command_win_over_those_before_it() -> None:
    before = Options(nats_url="a", node="n", output=Output.JSON)

    assert Options(nats_url="b").over(before) == Options(nats_url="b", node="n", output=Output.JSON)
    assert Options().over(before) == before


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_of_the_contract_can_be_typed_and_has_an_example(verb: str) -> None:
    group, name = verb.replace("_", "-").split(".")
    found = {command.name: command.callback for command in GROUPS[group].registered_commands}

    assert name in found
    assert f"vcnode {group} {name}" in (getattr(found[name], "__doc__", "") or "")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        ((), "pydantic nats rich structlog vcnode.models"),
        (("--help",), "pydantic nats rich structlog vcnode.models"),
        # Typer itself needs pydantic to read the options of a subcommand.
        (("pod", "run", "--help"), "nats rich structlog vcnode.models"),
        (("node", "run", "-h"), "nats rich structlog vcnode.models"),
    ],
)
def test_help_comes_at_once_without_what_takes_long_to_import(arguments: tuple[str, ...], heavy: str) -> None:
    code = f"""
import sys
from vcnode.cli import main
try:
    main()
except SystemExit:
    pass
print(sorted(set({heavy.split()}) & set(sys.modules)), file=sys.stderr)
"""

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )

    assert "Usage: " in done.stdout + done.stderr
    assert done.stderr.endswith("[]\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("pod", "run", "--memory", "x"),
        ("nope",),
        ("pod", "nope"),
        ("container", "exec", "p"),
        ("--output", "xml"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_2_and_says_why(arguments: tuple[str, ...]) -> None:
    result = run(arguments)

    assert result.code == 2
    assert result.out == ""
    assert "Error: " in result.err


def test_version() -> None:
    from vcnode import __version__

    assert run(("--version",)).out == f"vcnode {__version__}\n"
