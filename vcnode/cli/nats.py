"""``vcnode nats``: what each side may do on the NATS server."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer

from vcnode.cli.exits import Exit

app = typer.Typer(no_args_is_help=True, help="Permissions on the NATS server.")


@app.callback()
def nats() -> None:
    """Permissions on the NATS server."""


@app.command("permissions")
def permissions(
    role: Annotated[Literal["node", "scheduler", "observer"], typer.Argument(help="Whose permissions.")],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The node's name; for the others, any name of their own.")
    ],
    prefix: Annotated[str, typer.Option("--prefix", metavar="TOKEN", help="First subject token.")] = "vcnode",
    form: Annotated[
        Literal["config", "jwt"],
        typer.Option("--form", help="For a nats-server configuration, or the claims of a user's JWT."),
    ] = "config",
) -> None:
    """Print the permissions of a node, a scheduler or an observer.

    The user must set nats.inbox_prefix as the last line (on stderr) says.

    \b
    vcnode nats permissions node host1
    vcnode nats permissions scheduler main --form jwt
    """
    from vcnode.models import permissions as ready_made
    from vcnode.models.subjects import Subjects

    try:
        made = ready_made.permissions(ready_made.Role(role), name, Subjects(prefix))
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(Exit.USAGE)
    print(made.as_config() if form == "config" else json.dumps(made.as_claims(), indent=2))
    print(f'nats.inbox_prefix = "{made.inbox_prefix}"', file=sys.stderr)
