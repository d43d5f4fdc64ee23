"""``vcnode image``: the images of a node."""

from __future__ import annotations

from typing import Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command

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
    """Make an image of a root filesystem that lies on the node's host, under one of its allowed roots.

    \b
    vcnode image import busybox /srv/busybox.tar
    vcnode image import app:1.2 /srv/app/rootfs
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.image_import(name, path, command_id=command_id, deadline_s=cli.options.deadline_s)
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
