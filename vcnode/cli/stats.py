"""``vcnode pod stats``: what a pod and its containers use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command

if TYPE_CHECKING:
    from vcnode.models.stats import PodStats

NoGuest = Annotated[
    bool, typer.Option("--no-guest", help="Ask the host only; an idle guest is not woken, no containers.")
]


def register(pod_app: typer.Typer) -> None:
    """Add the command to ``pod``."""
    command(pod_app, "stats")(stats)


async def stats(
    cli: Cli,
    pod_id: flags.Pod,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the pod stops; CPU is that of the interval.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, max=240.0, help="Between two samples.")
    ] = 2.0,
    no_guest: NoGuest = False,
) -> None:
    """Show CPU, memory, processes and I/O of a pod's VM, of its guest, and of each container.

    The line 'vm' is what the host gives: its memory without the guest's is the VM's overhead. JSON output has
    all numbers; with --follow it is one sample a line.

    \b
    vcnode pod stats web
    vcnode pod stats -f --interval 5 web
    vcnode pod stats --no-guest -o json web | jq .vm.overhead_bytes
    """
    from vcnode.cli import usage

    async with cli.node() as node:
        if not follow:
            reply = await node.pod_stats(pod_id, guest=not no_guest, deadline_s=cli.options.deadline_s)
            cli.show(reply, usage.sample)
            return
        before: PodStats | None = None
        async for reply in node.follow_stats(pod_id, guest=not no_guest, interval_s=interval):
            if cli.json:
                print(reply.model_dump_json(), flush=True)
            else:
                usage.sample(reply, before)
                print(flush=True)
            before = reply
