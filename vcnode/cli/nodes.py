"""``vcnode node``: the node agent itself."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, NatsUrl, Prefix, command
from vcnode.cli.exits import Exit

app = typer.Typer(no_args_is_help=True, help="The node agent: run it, look at it.")


@app.command("run")
def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="TOML file with settings.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name of this node, unique in the fleet.")
    ] = None,
    nats_url: NatsUrl = None,
    prefix: Prefix = None,
    hypervisor: Annotated[
        str | None, typer.Option("--hypervisor", metavar="qemu|mock", help="Used when a pod names none.")
    ] = None,
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="TYPE", help="Guest agent, when a pod names none.")
    ] = None,
    network: Annotated[
        str | None, typer.Option("--network", metavar="MODEL", help="Network, when a pod names none.")
    ] = None,
    accel: Annotated[
        str | None, typer.Option("--accel", metavar="auto|kvm|tcg", help="How VMs are run.")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Database and images; survives reboots.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Sockets of running VMs; a short path.")] = None,
    guest_dir: Annotated[Path | None, typer.Option(help="Guest image, from 'vcnode guest build'.")] = None,
    allowed_root: Annotated[
        list[Path] | None,
        typer.Option(help="Host paths in commands must lie under one of these; may be repeated."),
    ] = None,
    metrics_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Metrics and health; '' turns it off.")
    ] = None,
    faults: Annotated[
        str | None, typer.Option(metavar="PLAN", help="Faults of the mock hypervisor (docs/mock.md).")
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="auto|json|text", help="Form of the log.")] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")
    ] = None,
) -> None:
    """Run the node agent until SIGTERM or Ctrl-C; pods keep running when it ends.

    Every setting may stand in the file, in the environment (VCNODE_NODE_NAME, VCNODE_NATS_URL, ...) or, for
    the ones below, on the command line; the latter win.

    \b
    vcnode node run --nats-url nats://10.0.0.5:4222 --name host1
    vcnode node run --config /etc/vcnode/node.toml
    vcnode node run --hypervisor mock          no VM, no root: the contract for your own tests
    """
    from vcnode.cli.command import complain
    from vcnode.cli.settings import load
    from vcnode.errors import VcnodeError

    try:
        settings = load(
            config,
            node_name=name,
            nats={"url": nats_url, "prefix": prefix},
            qemu={"accel": accel},
            hypervisor=hypervisor,
            agent=agent,
            network=network,
            state_dir=state_dir,
            run_dir=run_dir,
            guest_dir=guest_dir,
            allowed_roots=tuple(allowed_root) if allowed_root else None,
            metrics_address=metrics_address,
            faults=faults,
            log_format=log_format,
            log_level=log_level,
        )
        from vcnode import logs, node

        logs.stderr(settings.log_format, settings.log_level)
        asyncio.run(node.run(settings))
    except VcnodeError as exc:
        from vcnode.cli.exits import exit_code

        complain(exc, output=None)
        sys.exit(exit_code(exc))
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


@command(app, "info")
async def info(cli: Cli) -> None:
    """Show what a node is and has: drivers, accelerator, host, pods.

    \b
    vcnode node info
    vcnode node info --node host1 -o json
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.node_info(deadline_s=cli.options.deadline_s)
    cli.show(reply, views.node)


@command(app, "audit")
async def audit(
    cli: Cli,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is nobody's.")] = False,
) -> int:
    """List what a node holds on its host, and what of it is nobody's; ends with 1 when such a thing is left.

    \b
    vcnode node audit
    vcnode node audit --node host1 --repair
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.node_audit(repair=repair, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.audit)
    clean = reply.orphan_count == reply.freed_count and not reply.problems
    return Exit.OK if clean else Exit.FAILED


@command(app, "ping")
async def ping(
    cli: Cli,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.01, help="How long to wait for answers.")
    ] = 1.0,
) -> int:
    """Ask all nodes, or the one named by --node, for a sign of life; ends with 5 when none answers.

    \b
    vcnode node ping
    vcnode node ping --node host1
    """
    from vcnode.cli import views

    async with cli.client() as client:
        if cli.options.node:
            replies = [await client.node(cli.options.node).node_ping(deadline_s=timeout)]
        else:
            replies = sorted(await client.ping_all(timeout_s=timeout), key=lambda reply: reply.node)
    if cli.json:
        for reply in replies:
            print(reply.model_dump_json())
    elif replies:
        views.pings(replies)
    else:
        print("no node answered", file=sys.stderr)
    return Exit.OK if replies else Exit.UNAVAILABLE


@command(app, "label")
async def label(
    cli: Cli,
    labels: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE|KEY-", help="Label to set, or with '-' to remove.")
    ],
    command_id: flags.CommandId = None,
) -> None:
    """Set or remove labels of a node, by which schedulers choose; survives its restarts.

    \b
    vcnode node label zone=a disk=ssd --node host1
    vcnode node label zone- --node host1
    """
    from vcnode.cli import fleet_views, specs

    remove = [text[:-1] for text in labels if text.endswith("-") and "=" not in text]
    to_set = specs.pairs([text for text in labels if "=" in text or not text.endswith("-")], "KEY=VALUE")
    async with cli.node() as node:
        reply = await node.node_label(
            to_set, remove=remove, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, fleet_views.standing)


@command(app, "cordon")
async def cordon(
    cli: Cli,
    reason: Annotated[str, typer.Option("--reason", help="For people; shown in refusals.")] = "",
    command_id: flags.CommandId = None,
) -> None:
    """Have a node take no new pods; those that it has go on.

    \b
    vcnode node cordon --node host1 --reason "new kernel on friday"
    """
    from vcnode.cli import fleet_views

    async with cli.node() as node:
        reply = await node.node_cordon(reason, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, fleet_views.standing)


@command(app, "uncordon")
async def uncordon(cli: Cli, command_id: flags.CommandId = None) -> None:
    """Have a node take new pods again.

    \b
    vcnode node uncordon --node host1
    """
    from vcnode.cli import fleet_views

    async with cli.node() as node:
        reply = await node.node_uncordon(command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, fleet_views.standing)


@command(app, "drain")
async def drain(
    cli: Cli,
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", min=0, help="What still runs then is killed."),
    ] = 300.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the pods as well.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="For people; shown in refusals.")] = "drained",
    command_id: flags.CommandId = None,
) -> int:
    """Stop all pods of a node, those of the lowest priority first, and have it take no new ones.

    'vcnode events --node host1' shows how far it is. Ends with 1 when a pod could not be stopped.

    \b
    vcnode node drain --node host1
    vcnode node drain --node host1 --timeout 60 --delete
    """
    from vcnode.cli import fleet_views

    async with cli.node() as node:
        reply = await node.node_drain(
            timeout_s=timeout,
            delete=delete,
            reason=reason,
            command_id=command_id,
            deadline_s=cli.options.deadline_s,
        )
    cli.show(reply, fleet_views.drained)
    return Exit.FAILED if reply.failed else Exit.OK
