"""``vcnode policy``: what a node's policy says, without asking the node."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from vcnode.cli.command import Config
from vcnode.cli.exits import Exit, as_text, exit_code

app = typer.Typer(no_args_is_help=True, help="What the node's policy allows.")


@app.callback()
def policy() -> None:
    """What the node's policy allows."""


@app.command("check")
def check(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A pod spec, as for 'pod run -f'; '-' reads it from stdin.")
    ],
    config: Config = None,
) -> None:
    """Say what of a pod the policy in a node's settings denies; 8 if there is anything.

    The name of an image counts as the reference that it was pulled by; a node knows better.

    \b
    vcnode policy check pod.json --config /etc/vcnode/node.toml
    """
    from vcnode.cli import flags, settings, specs
    from vcnode.errors import VcnodeError
    from vcnode.models.commands import PodCreate
    from vcnode.models.node import ImageStatus
    from vcnode.pods import policy as decisions

    try:
        rules = settings.load(config).policy
        pod = specs.pod_spec(flags.read_spec(file), specs.PodFlags(), specs.ContainerFlags())
        names = {c.image for c in pod.containers if c.image is not None}
        images = {
            name: ImageStatus(
                name=name, digest="", size_bytes=0, imported_at=datetime.now(UTC), reference=name
            )
            for name in names
        }
        denials = decisions.judge(PodCreate(pod=pod), rules, decisions.Known(images, {}))
    except VcnodeError as exc:
        for line in as_text(exc):
            print(line, file=sys.stderr)
        sys.exit(exit_code(exc))
    for denial in denials:
        print(f"denied by {denial.rule}: {denial.field}: {denial.message}")
    if denials:
        sys.exit(Exit.DENIED)
    print("allowed")
