"""``vcnode port-forward``."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from typing import Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command
from vcnode.cli.exits import UsageError

MAX_PORT = 65_535


async def forward(
    cli: Cli,
    pod_id: flags.Pod,
    ports: Annotated[list[str], typer.Argument(metavar="[LOCAL:]PORT...", help="Ports; LOCAL 0: any free.")],
    address: Annotated[str, typer.Option("--address", help="Where to listen on this machine.")] = "127.0.0.1",
) -> None:
    """Listen on local ports and forward each connection to a port inside a pod, until interrupted.

    \b
    vcnode port-forward web 8080:80
    vcnode pod forward web 8080:80 5432
    """
    wanted = [_parse(port) for port in ports]
    async with cli.node() as node, node.forward(pod_id) as session, AsyncExitStack() as stack:
        for local, port in wanted:
            try:
                bound = await stack.enter_async_context(session.listen(port, host=address, local_port=local))
            except OSError as exc:
                raise UsageError(f"Port {local} cannot be listened on: {exc.strerror}.") from exc
            print(f"{address}:{bound} -> {pod_id}:{port}", file=sys.stderr, flush=True)
        raise await session.ended()


def _parse(text: str) -> tuple[int, int]:
    local, _, port = text.rpartition(":")
    try:
        found = int(local or port), int(port)
    except ValueError:
        raise UsageError(f"{text!r} is neither PORT nor LOCAL:PORT.") from None
    if not (0 <= found[0] <= MAX_PORT and 1 <= found[1] <= MAX_PORT):
        raise UsageError(f"{text!r}: ports are numbers up to {MAX_PORT}.")
    return found


def register(root: typer.Typer, pods: typer.Typer) -> None:
    """Add the command, and its short form."""
    command(root, "port-forward")(forward)
    command(pods, "forward")(forward)
