"""``vcnode guest``: the guest image that all VMs of a node boot."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="The guest image: kernel and initramfs of all VMs.")
