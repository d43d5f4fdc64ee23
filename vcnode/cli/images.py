"""``vcnode image``: the images of a node."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command
from vcnode.cli.exits import UsageError

MAX_PASSWORD_CHARS = 16_384

app = typer.Typer(no_args_is_help=True, help="Images: read-only roots that containers share.")


@command(app, "import")
async def import_(
    cli: Cli,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to give it, such as busybox.")],
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Directory or tar file on the node's host, absolute.")
    ],
    command_id: flags.CommandId = None,
) -> None:
    """Make an image of what lies on the node's host, under one of its allowed roots.

    That is a root filesystem, an OCI image layout, or a tar file of either or of "docker save".

    \b
    vcnode image import busybox /srv/busybox.tar
    vcnode image import app:1.2 /srv/app/rootfs
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.image_import(name, path, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.image)


@command(app, "pull")
async def pull(
    cli: Cli,
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="Image in a registry, such as registry/team/app:1.2.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name to give it. Default: the reference.")
    ] = None,
    username: Annotated[
        str | None, typer.Option("--username", metavar="USER", help="Who pulls. Default: as the node is set.")
    ] = None,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the user's password from standard input.")
    ] = False,
    command_id: flags.CommandId = None,
) -> None:
    """Fetch an image from a registry. The same image again is fetched only if it has changed.

    \b
    vcnode image pull docker.io/library/busybox:1.36 --name busybox
    vcnode image pull registry.example/team/app:1.2 --username me --password-stdin < token
    """
    from vcnode.cli import specs, views
    from vcnode.models.commands import RegistryAuth

    auth = None
    if (username is None) == password_stdin:
        raise UsageError("Give --username and --password-stdin together.")
    if username is not None:
        secret = sys.stdin.read(MAX_PASSWORD_CHARS + 1).rstrip("\r\n")
        auth = specs.model(
            RegistryAuth, {"username": username, "password": secret}, "The credentials are not right."
        )
    async with cli.node() as node:
        reply = await node.image_pull(
            reference, name=name, auth=auth, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.image)


@command(app, "list")
async def list_(cli: Cli) -> None:
    """List the images of a node.

    \b
    vcnode image list
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.image_list(deadline_s=cli.options.deadline_s)
    cli.show(reply, views.images)


@command(app, "status")
async def status(cli: Cli, name: flags.ImageName) -> None:
    """Show one image.

    \b
    vcnode image status busybox
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.image_status(name, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.image)


@command(app, "remove")
async def remove(cli: Cli, name: flags.ImageName, command_id: flags.CommandId = None) -> None:
    """Remove an image that no container uses. Removing what does not exist succeeds.

    \b
    vcnode image remove busybox
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.image_remove(name, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.image_removed)
