"""What ``pod exec`` and ``container exec`` share: the request's options, and what becomes of the reply."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, BinaryIO, TypedDict

from vcnode.cli.exits import Exit, UsageError

if TYPE_CHECKING:
    from vcnode.cli.command import Cli
    from vcnode.cli.specs import CmdFlags
    from vcnode.models.pod import Cmd, ExecResult, Output

MAX_STDIN_BYTES = 256 * 1024
"""Most bytes of standard input that fit one request; longer input needs a stream."""


class ExecArguments(TypedDict):
    """Arguments of the client's exec methods."""

    cmd: Cmd
    stdin: bytes
    timeout_s: float | None


def words(args: list[str]) -> list[str]:
    """The command's own words: without the ``--`` that may set them off from ours."""
    return args[1:] if args[:1] == ["--"] else args


def arguments(flags: CmdFlags, *, stdin: bool, timeout_s: float | None) -> ExecArguments:
    """What the client's exec methods take, from the command line and, if asked for, standard input.

    Raises:
        UsageError: A value is wrong, or standard input is longer than MAX_STDIN_BYTES.
    """
    from vcnode.cli import specs

    data = b""
    if stdin:
        data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
        if len(data) > MAX_STDIN_BYTES:
            raise UsageError(
                f"Standard input is longer than the {MAX_STDIN_BYTES} bytes that one exec takes."
            )
    return ExecArguments(cmd=specs.cmd(flags), stdin=data, timeout_s=timeout_s)


def finish(cli: Cli, result: ExecResult) -> int:
    """Pass the command's output on, as it is, and return the exit code to end with."""
    if cli.json:
        from vcnode.cli.output import show_json

        show_json(result)
    else:
        _write(sys.stdout.buffer, result.stdout, "standard output")
        _write(sys.stderr.buffer, result.stderr, "standard error")
    if result.timed_out:
        print("vcnode: the command was killed at its time limit", file=sys.stderr)
        return Exit.EXEC_TIMED_OUT
    return result.exit_code


def _write(stream: BinaryIO, output: Output, name: str) -> None:
    stream.write(output.raw)
    stream.flush()
    if output.truncated:
        kept = len(output.raw)
        print(f"vcnode: {name}: the first {kept} of {output.total_bytes} bytes are shown", file=sys.stderr)
