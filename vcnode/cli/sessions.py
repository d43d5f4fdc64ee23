"""``vcnode session``: commands with their streams; and ``vcnode exec``."""

from __future__ import annotations

from typing import Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command
from vcnode.cli.complete import complete_pod
from vcnode.cli.exits import Exit

app = typer.Typer(no_args_is_help=True, help="Sessions: the streams of what runs inside a pod.")

Keep = Annotated[
    bool, typer.Option("--keep", help="Keep it running when this command dies; resume it within 10 minutes.")
]
SessionIdArgument = Annotated[str, typer.Argument(metavar="SESSION", help="Session id.")]


async def exec_(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    args: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Program and arguments.")],
    env: flags.Env = None,
    workdir: flags.Workdir = None,
    user: flags.User = None,
    stdin: flags.Stdin = False,
    tty: flags.Tty = False,
    keep: Keep = False,
    command_id: flags.CommandId = None,
) -> int:
    """Run a command in a running container, with its input and output as they come. Options go before POD.

    With -t it has a terminal; Ctrl-P Ctrl-Q leaves it running. Ends with the command's exit code, or with 125
    when vcnode failed.

    \b
    vcnode exec -it web main -- sh
    vcnode exec -i web main -- sort < words
    vcnode session exec -it --user nobody web main -- sh
    """
    from vcnode.cli import execs, interactive, specs, terminal
    from vcnode.models.sessions import TerminalSize

    interactive.check_terminal(wanted=tty)
    described = specs.CmdFlags(args=execs.words(args), env=env or (), workdir=workdir, user=user)
    rows, columns = terminal.size()
    async with cli.node() as node:
        opened = node.exec_stream(
            pod_id,
            container_id,
            specs.cmd(described),
            tty=TerminalSize(rows=rows, columns=columns) if tty else None,
            when_lost="keep" if keep else "kill",
            command_id=command_id,
            deadline_s=cli.options.deadline_s,
        )
        async with opened as process:
            return await interactive.interact(process, stdin=stdin)


EXEC = {"failure": Exit.EXEC_FAILED, "context_settings": {"allow_interspersed_args": False}}
command(app, "exec", **EXEC)(exec_)  # type: ignore[arg-type]


async def attach(
    cli: Cli, pod_id: flags.Pod, container_id: flags.Container, stdin: flags.Stdin = False
) -> int:
    """Show what a container's main process writes from now on; with -i, type into it.

    Input needs a container made with --stdin. Ctrl-C leaves it running, or Ctrl-P Ctrl-Q where it was made
    with --tty. Ends with the exit code of the main process.

    \b
    vcnode attach -i web main
    vcnode container attach web main
    """
    from vcnode.cli import interactive

    async with cli.node() as node, node.attach(pod_id, container_id) as process:
        return await interactive.interact(process, stdin=stdin)


@command(app, "resume", failure=Exit.EXEC_FAILED)
async def resume(cli: Cli, session_id: SessionIdArgument, stdin: flags.Stdin = False) -> int:
    """Go on with a session that was detached from, or whose client died.

    \b
    vcnode session resume -i 6f1f0c1e5b0e4b8fa2ce0ad4c9f0b7aa
    """
    from vcnode.cli import interactive

    async with cli.node() as node, node.resume_stream(session_id) as process:
        return await interactive.interact(process, stdin=stdin)


@command(app, "list")
async def list_(
    cli: Cli,
    pod_id: Annotated[
        str | None,
        typer.Argument(metavar="[POD]", help="Only of this pod.", autocompletion=complete_pod),
    ] = None,
) -> None:
    """List the sessions of the node. Their ids are secrets, and not shown.

    \b
    vcnode session list web
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.session_list(pod_id=pod_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.sessions)


@command(app, "close")
async def close(cli: Cli, session_id: SessionIdArgument, command_id: flags.CommandId = None) -> None:
    """End a session, and what it runs.

    \b
    vcnode session close 6f1f0c1e5b0e4b8fa2ce0ad4c9f0b7aa
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.session_close(session_id, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.session_closed)


def register(root: typer.Typer, containers: typer.Typer) -> None:
    """Add the short forms to the ``vcnode`` command."""
    command(root, "attach", failure=Exit.EXEC_FAILED)(attach)
    command(containers, "attach", failure=Exit.EXEC_FAILED)(attach)
    command(root, "exec", **EXEC)(exec_)  # type: ignore[arg-type]
