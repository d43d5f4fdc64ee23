"""``vcnode events``: what happened, and what happens."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

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
    raise NotImplementedError


def start_of(text: str, *, now: datetime) -> datetime:
    """The moment that ``--since`` names, seen from *now*.

    Raises:
        UsageError: It is neither an age nor a time with its zone.
    """
    if found := _AGE.fullmatch(text):
        return now - timedelta(seconds=float(found[1]) * _UNITS_S[found[2]])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(
            f"--since needs an age such as 10m, a time such as 2030-01-31T12:00:00Z, or 'all'; not {text!r}."
        ) from exc
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
