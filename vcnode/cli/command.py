"""How a function becomes a command: shared options, event loop, errors to exit codes.

A command is an async function whose first parameter is a `Cli`; `command` puts the options that all
commands share in its place, so that they may stand anywhere on the line::

    @command(app, "list")
    async def pod_list(cli: Cli, ...) -> None: ...

Nothing here, nor in the modules that define commands, imports models or NATS while being imported: the help
must come at once.
"""

from __future__ import annotations

import asyncio
import getpass
import inspect
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vcnode.cli.exits import Exit, UsageError, as_json, as_text, exit_code
from vcnode.errors import VcnodeError

if TYPE_CHECKING:
    from vcnode.client import Client, NodeClient
    from vcnode.models.base import Reply
    from vcnode.settings import NatsSettings

R = TypeVar("R", bound="Reply")

Work = Callable[..., Awaitable[int | None]]
"""A command's function; what it returns, if anything, is the exit code."""

DISCOVERY_S = (0.25, 2.0)
"""How long nodes may take to answer when none was named: at first, and once more when none did."""


class Output(StrEnum):
    """How replies are shown."""

    TABLE = "table"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Options:
    """The options that all commands share; None where not given."""

    nats_url: str | None = None
    prefix: str | None = None
    node: str | None = None
    output: Output | None = None
    config: Path | None = None
    deadline_s: float | None = None

    def over(self, base: Options) -> Options:
        """These options, with those of *base* where these say nothing."""
        given = {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}
        return replace(base, **given)


def _complete_node(ctx: typer.Context, incomplete: str) -> list[str]:
    from vcnode.cli.complete import complete_node

    return complete_node(ctx, incomplete)


NatsUrl = Annotated[
    str | None, typer.Option("--nats-url", metavar="URL", help="NATS servers, separated by commas.")
]
Prefix = Annotated[str | None, typer.Option("--prefix", metavar="TOKEN", help="First token of all subjects.")]
Node = Annotated[
    str | None,
    typer.Option(
        "--node",
        "-n",
        metavar="NAME",
        help="Node to ask; not needed while there is only one.",
        autocompletion=_complete_node,
    ),
]
OutputOption = Annotated[
    Output | None, typer.Option("--output", "-o", help="Tables for people, JSON for programs.")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file with settings; the [nats] table is used here."),
]
DeadlineS = Annotated[
    float | None,
    typer.Option("--deadline", metavar="SECONDS", min=0.001, help="Give up after this long."),
]

SHARED: dict[str, Any] = {
    "nats_url": NatsUrl,
    "prefix": Prefix,
    "node": Node,
    "output": OutputOption,
    "config": Config,
    "deadline_s": DeadlineS,
}
"""The shared options by parameter name; all default to None."""


class Cli:
    """What a command has at hand: its options, the way to the node, and the way to the terminal."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def json(self) -> bool:
        """Whether replies are shown as JSON."""
        return self.options.output is Output.JSON

    def show(self, reply: R, view: Callable[[R], None]) -> None:
        """Show *reply* as JSON, or to people as *view* lays it out."""
        if self.json:
            from vcnode.cli.output import show_json

            show_json(reply)
        else:
            view(reply)

    def nats_settings(self) -> NatsSettings:
        """How to reach NATS: file, ``VCNODE_NATS_*`` and flags, the same as for the node agent.

        Raises:
            UsageError: A setting is wrong; the message names it.
        """
        from vcnode.cli.settings import load

        flags = {"url": self.options.nats_url, "prefix": self.options.prefix}
        found = load(self.options.config, nats=flags).nats
        return found if found.actor is not None else found.model_copy(update={"actor": who_runs_this()})

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A connection to NATS, for as long as the block runs.

        Raises:
            UnavailableError: NATS cannot be reached.
        """
        from vcnode.client import Client

        async with await Client.connect(self.nats_settings()) as client:
            yield client

    @asynccontextmanager
    async def node(self) -> AsyncIterator[NodeClient]:
        """The node that was named, or the only one there is.

        Raises:
            UnavailableError: NATS cannot be reached, or no node answers.
            UsageError: None was named and there are several.
        """
        async with self.client() as client:
            yield client.node(self.options.node or await only_node(client))


def who_runs_this() -> str | None:
    """The user and host that a command is typed by and on, for audit events; None if that has no name."""
    try:
        name = f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # no entry in passwd
        return None
    return name[:256] if name.isascii() and name.isprintable() else None


async def only_node(client: Client) -> str:
    """The name of the one node that answers a ping.

    Raises:
        UnavailableError: None answers.
        UsageError: Several answer; the message names them.
    """
    from vcnode.errors import UnavailableError

    found: list[str] = []
    for timeout_s in DISCOVERY_S:
        found = found or sorted(ping.node for ping in await client.ping_all(timeout_s=timeout_s))
    if not found:
        raise UnavailableError(
            "No node answers on this NATS server; start one with 'vcnode node run', "
            "or check --nats-url and --prefix."
        )
    if len(found) > 1:
        raise UsageError(
            f"There are {len(found)} nodes: {', '.join(found)}; choose one with --node.", nodes=found
        )
    return found[0]


def command(
    app: typer.Typer, name: str, *, failure: Exit | None = None, **settings: Any
) -> Callable[[Work], Callable[..., None]]:
    """Register an async function as the command *name* of *app*.

    Args:
        app: Where it goes.
        name: The word that calls it.
        failure: Exit code of every error of vcnode, for commands that pass on somebody else's exit codes.
        settings: Passed to typer.
    """

    def register(function: Work) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())[1:]

        def run(ctx: typer.Context, **values: Any) -> None:
            mine = Options(**{key: values.pop(key) for key in SHARED})
            options = mine.over(ctx.obj) if isinstance(ctx.obj, Options) else mine
            sys.exit(
                execute(lambda: function(Cli(options), **values), output=options.output, failure=failure)
            )

        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for key, annotation in SHARED.items()
        ]
        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([context, *keyword, *shared])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name, **settings)(run)
        return run

    return register


def execute(
    work: Callable[[], Awaitable[int | None]], *, output: Output | None = None, failure: Exit | None = None
) -> int:
    """Run *work* in an event loop of its own and turn how it ends into an exit code; errors go to stderr.

    A command that returns a number chooses its exit code itself.
    """

    async def main() -> int | None:
        return await work()

    try:
        return asyncio.run(main()) or Exit.OK
    except VcnodeError as exc:
        complain(exc, output=output)
        if isinstance(exc, UsageError):
            return Exit.USAGE
        return failure if failure is not None else exit_code(exc)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as with `vcnode events | head`: nothing is wrong. Python must
        # not find the pipe broken once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK


def complain(error: VcnodeError, *, output: Output | None) -> None:
    """Write *error* to standard error, in the chosen form."""
    from vcnode.cli.output import printable

    if output is Output.JSON:
        print(as_json(error), file=sys.stderr)
    else:
        for line in as_text(error):
            print(printable(line), file=sys.stderr)
