"""``vcnode demo``: one pod in a VM, driven over NATS, from nothing to nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command("demo")(demo)


def demo(
    hypervisor: Annotated[
        str, typer.Option("--hypervisor", metavar="qemu|mock", help="mock shows the play without a VM.")
    ] = "qemu",
    accel: Annotated[
        str, typer.Option("--accel", metavar="auto|kvm|tcg", help="auto tries KVM first.")
    ] = "auto",
    guest_dir: Annotated[
        Path, typer.Option(envvar="VCNODE_GUEST_DIR", help="Guest image, from 'vcnode guest build'.")
    ] = Path("/var/lib/vcnode/guest"),
    memory: Annotated[int, typer.Option("--memory", metavar="MIB", help="Memory of the pod.")] = 256,
) -> None:
    """Play a central scheduler: run a pod in a VM over NATS, look into it, and leave nothing behind.

    Starts a private nats-server and a node agent in a temporary directory; touches nothing else. Ends with 1
    when anything of it is left on the host.

    \b
    vcnode demo
    vcnode demo --hypervisor mock      without root, QEMU or guest image
    """
    from vcnode.cli.command import execute
    from vcnode.cli.demo.scenario import Play, perform
    from vcnode.cli.demo.screen import Screen
    from vcnode.cli.exits import Exit
    from vcnode.cli.output import console

    screen = Screen(console())

    async def play() -> int:
        clean = await perform(Play(hypervisor, accel, guest_dir, memory), screen)
        return Exit.OK if clean else Exit.FAILED

    sys.exit(execute(play))
