"""``vcnode events``: what happened, and what happens."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vcnode.cli.command import Cli, command
from vcnode.cli.complete import complete_pod
from vcnode.cli.exits import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from vcnode.models.events import Event

_AGE = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    command(app, "events")(events)


async def events(
    cli: Cli,
    pod: Annotated[
        list[str] | None,
        typer.Option("--pod", metavar="POD", help="Only of this pod.", autocompletion=complete_pod),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="KIND", help="Only of this kind, such as pod.started or 'pod.*'."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="WHEN", help="Age (10m, 2h) or RFC 3339 time; 'all' is everything."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-F", help="Go on with new events until Ctrl-C.")
    ] = False,
) -> None:
    """Show events: those that the stream still holds, or with --follow new ones as they come.

    With --node only that node's. JSON output is one CloudEvent a line.

    \b
    vcnode events --since 10m
    vcnode events --follow --pod web
    vcnode events --follow --kind container.exited -o json
    """
    where: Literal["now", "all"] | datetime
    if since is None:
        where = "now" if follow else "all"
    else:
        where = "all" if since == "all" else start_of(since, now=datetime.now(UTC))
    async with (
        cli.client() as client,
        client.events(
            node=cli.options.node, pods=pod or (), kinds=kind or (), since=where, follow=follow
        ) as stream,
    ):
        if cli.json:
            async for event in stream:
                print(event.model_dump_json(), flush=True)
        else:
            from vcnode.cli.output import console

            out = console()
            async for event in stream:
                out.print(line(event), soft_wrap=True)


def line(event: Event) -> Text:
    """One event on one line: when, where, what, whom, and what matters about it."""
    from rich.text import Text

    from vcnode.cli.output import STATE_STYLES, printable

    style = STATE_STYLES.get(event.kind.partition(".")[2], "")
    return Text.assemble(
        (event.time.astimezone().strftime("%H:%M:%S.%f")[:-3], "dim"),
        f"  {printable(event.source.rpartition('/')[2])}  ",
        (printable(event.kind), style),
        f"  {printable(event.subject)}",
        (f"  {printable(remark)}" if (remark := remark_on(event)) else "", "dim"),
        (" (mock)" if event.mock else "", "dim"),
    )


def remark_on(event: Event) -> str:
    """What people want to know of *event* besides its kind and subject."""
    data = event.data
    words = []
    if event.kind == "container.exited" and data.get("exit_code") is not None:
        words.append(f"exit code {data['exit_code']}")
    if data.get("oom_killed"):
        words.append("out of memory")
    if (
        event.kind == "pod.started"
        and isinstance(phases := data.get("phases_ms"), dict)
        and "total" in phases
    ):
        words.append(f"in {phases['total']:.0f} ms")
    if data.get("reason"):
        words.append(str(data["reason"]).replace("\n", " "))
    return ", ".join(words)


def start_of(text: str, *, now: datetime) -> datetime:
    """The moment that ``--since`` names, seen from *now*.

    Raises:
        UsageError: It is neither an age nor a time with its zone.
    """
    try:
        if found := _AGE.fullmatch(text):
            return now - timedelta(seconds=float(found[1]) * _UNITS_S[found[2]])
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as exc:
        raise UsageError(
            f"--since needs an age such as 10m, a time such as 2030-01-31T12:00:00Z, or 'all'; not {text!r}."
        ) from exc
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
