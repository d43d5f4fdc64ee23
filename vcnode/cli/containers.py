"""``vcnode container``: the containers of a pod."""

from __future__ import annotations

from typing import Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command
from vcnode.cli.exits import Exit, UsageError
from vcnode.cli.logs import logs

app = typer.Typer(no_args_is_help=True, help="Containers: what runs inside a pod.")


@command(app, "create")
async def create(
    cli: Cli,
    pod_id: flags.Pod,
    args: flags.Args = None,
    file: flags.SpecFile = None,
    container_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Container id; the node makes one otherwise.")
    ] = None,
    image: flags.Image = None,
    rootfs: flags.Rootfs = None,
    env: flags.Env = None,
    workdir: flags.Workdir = None,
    user: flags.User = None,
    readonly: flags.Readonly = False,
    disk: flags.Disk = None,
    volume: flags.Mounts = None,
    tmpfs: flags.Tmpfs = None,
    label: flags.Label = None,
    annotation: flags.Annotation = None,
    cpus: flags.Cpus = None,
    mem_limit: flags.MemLimit = None,
    pids_limit: flags.PidsLimit = None,
    open_stdin: flags.OpenStdin = False,
    open_tty: flags.OpenTty = False,
    restart: flags.Restart = None,
    startup_probe: flags.StartupProbe = None,
    readiness_probe: flags.ReadinessProbe = None,
    liveness_probe: flags.LivenessProbe = None,
    command_id: flags.CommandId = None,
) -> None:
    """Add a container to a pod, which may be running. 'vcnode container start' starts it.

    \b
    vcnode container create web --id logger --image busybox -- sleep 3600
    vcnode container create web -f container.toml
    """
    from vcnode.cli import specs, views

    described = specs.ContainerFlags(
        container_id=container_id,
        image=image,
        rootfs=rootfs,
        readonly=readonly,
        disk_size_mib=disk,
        cpus=cpus,
        mem_limit_mib=mem_limit,
        pids_limit=pids_limit,
        stdin=open_stdin,
        tty=open_tty,
        mounts=tuple(volume or ()),
        tmpfs=tuple(tmpfs or ()),
        label=tuple(label or ()),
        annotation=tuple(annotation or ()),
        restart=restart,
        startup_probe=startup_probe,
        readiness_probe=readiness_probe,
        liveness_probe=liveness_probe,
        cmd=specs.CmdFlags(args=tuple(args or ()), env=tuple(env or ()), workdir=workdir, user=user),
    )
    spec = specs.container_spec(flags.read_spec(file), described)
    async with cli.node() as node:
        reply = await node.container_create(
            pod_id, spec, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.container)


@command(app, "start")
async def start(
    cli: Cli, pod_id: flags.Pod, container_id: flags.Container, command_id: flags.CommandId = None
) -> None:
    """Start a container of a running pod.

    \b
    vcnode container start web logger
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.container_start(
            pod_id, container_id, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.container)


@command(app, "stop")
async def stop(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    grace: flags.Grace = None,
    command_id: flags.CommandId = None,
) -> None:
    """Stop a container: its stop signal first, SIGKILL after the grace time.

    \b
    vcnode container stop web logger
    vcnode container stop --grace 0 web logger
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.container_stop(
            pod_id, container_id, grace_s=grace, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.container)


@command(app, "kill")
async def kill(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    signal: Annotated[
        str, typer.Option("--signal", "-s", metavar="SIGNAL", help="Name or number, such as HUP or 1.")
    ] = "KILL",
    all_: Annotated[
        bool, typer.Option("--all", "-a", help="Every process of the container, not only the main one.")
    ] = False,
    command_id: flags.CommandId = None,
) -> None:
    """Send a signal to a container.

    \b
    vcnode container kill web logger
    vcnode container kill -s HUP web logger
    """
    from vcnode.cli import specs, views

    number = specs.signal_number(signal)
    async with cli.node() as node:
        reply = await node.container_kill(
            pod_id,
            container_id,
            signal=number,
            all=all_,
            command_id=command_id,
            deadline_s=cli.options.deadline_s,
        )
    cli.show(reply, views.container)


@command(app, "pause")
async def pause(
    cli: Cli, pod_id: flags.Pod, container_id: flags.Container, command_id: flags.CommandId = None
) -> None:
    """Freeze all processes of a container, until 'container resume'.

    \b
    vcnode container pause web main
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.container_pause(
            pod_id, container_id, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.container)


@command(app, "resume")
async def resume(
    cli: Cli, pod_id: flags.Pod, container_id: flags.Container, command_id: flags.CommandId = None
) -> None:
    """Let a paused container go on.

    \b
    vcnode container resume web main
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.container_resume(
            pod_id, container_id, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.container)


@command(app, "wait", failure=Exit.EXEC_FAILED)
async def wait(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    condition: Annotated[
        str, typer.Option("--for", metavar="CONDITION", help="exited, running or removed.")
    ] = "exited",
) -> int:
    """Wait for a container; without --deadline for as long as it takes.

    Waiting for 'exited' prints the exit code and ends with it; a failure of vcnode itself is 125.

    \b
    vcnode container wait web main
    vcnode container wait --for running web main
    """
    from vcnode.cli import living

    return await living.wait(cli, pod_id, container_id, condition)


async def processes(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Most to list.")] = None,
) -> None:
    """List the processes of a container, the oldest first ('ps' for short).

    PID is their id inside the container.

    \b
    vcnode container ps web main
    vcnode container processes web main --limit 20
    """
    from vcnode.cli import living

    await living.ps(cli, pod_id, container_id, limit)


command(app, "processes")(processes)
command(app, "ps")(processes)


@command(app, "update")
async def update(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    cpus: Annotated[str | None, typer.Option("--cpus", help="CPUs that it may use, or 'none'.")] = None,
    cpu_shares: Annotated[
        str | None, typer.Option("--cpu-shares", help="Its weight (1024 is usual), or 'none'.")
    ] = None,
    mem_limit: Annotated[
        str | None, typer.Option("--memory-limit", metavar="MIB", help="Its memory limit, or 'none'.")
    ] = None,
    pids_limit: Annotated[
        str | None, typer.Option("--pids-limit", help="Most processes and threads, or 'none'.")
    ] = None,
    command_id: flags.CommandId = None,
) -> None:
    """Change limits of a container, also while it runs; 'none' lifts one.

    \b
    vcnode container update web main --memory-limit 128 --cpus 0.5
    vcnode container update web main --pids-limit none
    """
    from vcnode.cli import specs, views

    limits = specs.limits(cpus=cpus, cpu_shares=cpu_shares, mem_limit_mib=mem_limit, pids_limit=pids_limit)
    async with cli.node() as node:
        reply = await node.container_update(
            pod_id, container_id, limits, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.container)


@command(app, "delete")
async def delete(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    force: flags.Force = False,
    command_id: flags.CommandId = None,
) -> None:
    """Remove a container. It must not be running, unless --force kills it first.

    Deleting what does not exist succeeds, so it can be repeated.

    \b
    vcnode container delete web logger
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.container_delete(
            pod_id, container_id, force=force, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.container_deleted)


@command(app, "exec", failure=Exit.EXEC_FAILED, context_settings={"allow_interspersed_args": False})
async def exec_(
    cli: Cli,
    pod_id: flags.Pod,
    container_id: flags.Container,
    args: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Program and arguments.")],
    env: flags.Env = None,
    workdir: flags.Workdir = None,
    user: flags.User = None,
    stdin: flags.StdinFirst = False,
    tty: flags.Tty = False,
    timeout: flags.ExecTimeout = None,
    command_id: flags.CommandId = None,
) -> int:
    """Run a command in a running container. Options go before POD.

    Its output is shown when it has ended, up to a bound; with -t, or as 'vcnode exec', as it comes.

    Ends with the command's exit code; 124 when it was killed at --timeout, 125 when vcnode failed.

    \b
    vcnode container exec web main -- ls -l /
    vcnode container exec -i web main -- sh < script.sh
    vcnode container exec -it web main -- sh
    vcnode container exec --user nobody --timeout 5 web main id
    """
    from vcnode.cli import execs, sessions, specs

    if tty:
        if timeout is not None:
            raise UsageError("--timeout is for commands without a terminal.")
        return await sessions.exec_(
            cli,
            pod_id,
            container_id,
            args,
            env=env,
            workdir=workdir,
            user=user,
            stdin=stdin,
            tty=True,
            command_id=command_id,
        )
    described = specs.CmdFlags(args=execs.words(args), env=env or (), workdir=workdir, user=user)
    request = execs.arguments(described, stdin=stdin, timeout_s=timeout)
    async with cli.node() as node:
        reply = await node.container_exec(
            pod_id, container_id, **request, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    return execs.finish(cli, reply)


@command(app, "list")
async def list_(
    cli: Cli,
    pod_id: Annotated[
        str | None,
        typer.Argument(metavar="[POD]", help="Only of this pod.", autocompletion=flags.complete_pod),
    ] = None,
    states: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Only containers in this state.")
    ] = None,
    label: flags.Label = None,
    annotation: flags.Annotation = None,
) -> None:
    """List containers, of all pods or of one.

    \b
    vcnode container list
    vcnode container list web --state running
    """
    from vcnode.cli import specs, views
    from vcnode.models.commands import ContainerList

    data = {
        "pod_id": pod_id,
        "states": states or [],
        "labels": specs.pairs(label or (), "--label"),
        "annotations": specs.pairs(annotation or (), "--annotation"),
    }
    wanted = specs.model(ContainerList, data, "The selection is not right.")
    async with cli.node() as node:
        reply = await node.container_list(
            pod_id=wanted.pod_id,
            states=wanted.states,
            labels=wanted.labels,
            annotations=wanted.annotations,
            deadline_s=cli.options.deadline_s,
        )
    cli.show(reply, views.containers)


@command(app, "status")
async def status(cli: Cli, pod_id: flags.Pod, container_id: flags.Container) -> None:
    """Show all that the node knows of a container.

    \b
    vcnode container status web main
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.container_status(pod_id, container_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.container)


command(app, "logs")(logs)
