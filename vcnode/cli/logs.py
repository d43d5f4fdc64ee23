"""``vcnode logs``: what containers have written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from vcnode.cli.command import Cli, command
from vcnode.cli.complete import complete_container, complete_pod

if TYPE_CHECKING:
    from vcnode.models.logs import ContainerLogEntries, LogEntry


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    command(app, "logs")(logs)


async def logs(
    cli: Cli,
    pod_id: Annotated[str, typer.Argument(metavar="POD", help="The pod.", autocompletion=complete_pod)],
    container_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONTAINER]",
            help="The container; not needed when there is only one.",
            autocompletion=complete_container,
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written until it ends.")
    ] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", metavar="N", min=0, help="Only the last N lines.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="WHEN", help="Age (10m, 2h) or RFC 3339 time.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="WHEN", help="Age (10m, 2h) or RFC 3339 time.")
    ] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", "-t", help="Begin each line with its time.")
    ] = False,
) -> None:
    """Show what a container has written, its stderr on stderr.

    Lines that begin with "vcnode:" on stderr say what was lost. JSON output is one entry a line.

    \b
    vcnode logs web                     the same as 'vcnode container logs web'
    vcnode logs -f --tail 20 web main
    vcnode logs --since 10m --timestamps web
    """
    from datetime import UTC, datetime

    from vcnode.cli.events import start_of

    now = datetime.now(UTC)
    printer = _Printer(json=cli.json, timestamps=timestamps)
    async with cli.node() as node:
        async for reply in node.follow_logs(
            pod_id,
            container_id,
            follow=follow,
            tail=tail,
            since=None if since is None else start_of(since, now=now),
            until=None if until is None else start_of(until, now=now),
        ):
            printer.show(reply)


class _Printer:
    """Passes output on, as it is."""

    def __init__(self, *, json: bool, timestamps: bool) -> None:
        self._json = json
        self._timestamps = timestamps
        self._open_lines: dict[str, bool] = {}

    def show(self, reply: ContainerLogEntries) -> None:
        """Show the entries of a reply."""
        if reply.missed_bytes:
            print(
                f"vcnode: {reply.missed_bytes} bytes were deleted before they were read.",
                file=sys.stderr,
                flush=True,
            )
        for entry in reply.entries:
            if self._json:
                print(entry.model_dump_json())
            else:
                self._pass_on(entry)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    def _pass_on(self, entry: LogEntry) -> None:
        out: BinaryIO = (sys.stdout if entry.stream == "stdout" else sys.stderr).buffer
        data = entry.raw
        if out.isatty() and entry.stream != "node":
            data = data.replace(b"\x1b", b"^[")  # colours of programs, but also commands to the terminal
        if self._timestamps:
            stamp = f"{entry.time.isoformat()} ".encode()
            inside = self._open_lines.get(entry.stream, False)
            data = (b"" if inside or not data else stamp) + data.replace(b"\n", b"\n" + stamp)
            if data.endswith(b"\n" + stamp):
                data = data.removesuffix(stamp)
        if data:
            self._open_lines[entry.stream] = not data.endswith(b"\n")
            out.write(data)
            out.flush()
