"""The ``vcnode`` command, assembled."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vcnode.cli import (
    containers,
    contracts,
    demo,
    doctor,
    events,
    files,
    fleet,
    guest,
    images,
    logs,
    nats,
    nodes,
    pods,
    policy,
    ports,
    secrets,
    sessions,
    stats,
    top,
)
from vcnode.cli.command import Config, DeadlineS, Options, Output

app = typer.Typer(
    name="vcnode",
    no_args_is_help=True,
    # Plain help comes three times as fast as the coloured one.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pods.app, name="pod")
app.add_typer(containers.app, name="container")
app.add_typer(images.app, name="image")
app.add_typer(nodes.app, name="node")
app.add_typer(guest.app, name="guest")
app.add_typer(contracts.app, name="contracts")
app.add_typer(nats.app, name="nats")
app.add_typer(policy.app, name="policy")
app.add_typer(secrets.app, name="secret")
app.add_typer(sessions.app, name="session")
sessions.register(app, containers.app)
files.register(app, containers.app)
ports.register(app, pods.app)
stats.register(pods.app)
top.register(app)
events.register(app)
fleet.register(app, pods.app)
logs.register(app)
demo.register(app)
doctor.register(app)


def _version(asked: bool) -> None:
    if asked:
        from vcnode import __version__

        typer.echo(f"vcnode {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    nats_url: Annotated[
        str | None,
        typer.Option("--nats-url", envvar="VCNODE_NATS_URL", metavar="URL", help="NATS servers."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", envvar="VCNODE_NATS_PREFIX", metavar="TOKEN", help="First subject token."),
    ] = None,
    node: Annotated[
        str | None, typer.Option("--node", "-n", envvar="VCNODE_NODE", metavar="NAME", help="Node to ask.")
    ] = None,
    output: Annotated[
        Output | None, typer.Option("--output", "-o", envvar="VCNODE_OUTPUT", help="Form of replies.")
    ] = None,
    config: Config = None,
    deadline_s: DeadlineS = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pods as small virtual machines, driven over NATS.

    'vcnode demo' shows all of it on this host. 'vcnode node run' starts a node agent; the other commands talk
    to it over NATS. The options below may also stand behind any command.

    \b
    vcnode demo
    vcnode node run --nats-url nats://127.0.0.1:4222
    vcnode pod run --id web --image busybox -- httpd -f
    vcnode container exec web main -- ls /
    vcnode events --follow

    Exit codes: 0 done, 1 failed, 2 wrong usage or value, 3 not found, 4 forbidden in this state, 5 no answer
    in time, 6 resources exhausted, 7 not implemented, 8 denied by the node's policy. 'exec' ends with the
    command's own code.
    """
    ctx.obj = Options(
        nats_url=nats_url, prefix=prefix, node=node, output=output, config=config, deadline_s=deadline_s
    )


def main() -> None:
    """Entry point of the ``vcnode`` command."""
    # Typer colours its messages through rich, which takes longer to import than everything else here.
    os.environ.setdefault("TYPER_USE_RICH", "0")
    app()
