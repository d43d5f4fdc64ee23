"""``vcnode pod``: pods, from create to delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command
from vcnode.cli.exits import Exit

if TYPE_CHECKING:
    from vcnode.models.pod import PodSpec

app = typer.Typer(no_args_is_help=True, help="Pods: small VMs with containers inside.")

Id = Annotated[str | None, typer.Option("--id", metavar="ID", help="Pod id; the node makes one otherwise.")]
ContainerId = Annotated[
    str | None, typer.Option("--container", metavar="ID", help="Container id.", show_default="main")
]
Hostname = Annotated[str | None, typer.Option("--hostname", help="Hostname in the guest; else the pod id.")]
Vcpus = Annotated[int | None, typer.Option("--vcpus", metavar="N", min=1, help="Virtual CPUs of the VM.")]
Memory = Annotated[int | None, typer.Option("--memory", metavar="MIB", min=1, help="Memory of the VM.")]
HypervisorOption = Annotated[str | None, typer.Option("--hypervisor", help="qemu or mock; else the node's.")]
AgentOption = Annotated[str | None, typer.Option("--agent", help="Guest agent driver; else the node's.")]
NetworkOption = Annotated[
    str | None, typer.Option("--network", help="Network model: bridge, cni, cnm or noop; else the node's.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", help="auto, require, or never: always boot, which 'pod resize' needs."),
]
Join = Annotated[
    list[str] | None, typer.Option("--join", metavar="NETWORK", help="Network to join; one interface each.")
]
Netns = Annotated[
    str | None, typer.Option("--netns", metavar="PATH", help="Given network namespace, for network cnm.")
]
InterworkingOption = Annotated[
    str | None, typer.Option("--interworking", help="tc, bridged or macvtap: how interfaces reach the VM.")
]
Publish = Annotated[
    list[str] | None,
    typer.Option("--publish", "-p", metavar="HOST:POD[/udp]", help="Port of the host that leads to the pod."),
]
Rate = Annotated[
    float | None, typer.Option("--rate-mbit", help="Limit of what the pod sends, and of what it receives.")
]
Dns = Annotated[list[str] | None, typer.Option("--dns", metavar="ADDRESS", help="Name server of the pod.")]


async def _create_or_run(cli: Cli, run: bool, spec: PodSpec, command_id: str | None) -> None:
    from vcnode.cli import views

    async with cli.node() as node:
        send = node.pod_run if run else node.pod_create
        reply = await send(spec, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.pod)


def _creating(run: bool) -> str:
    if run:
        return """Create a pod and start it.

        Describe it by flags, or in a file with the fields of a pod spec; flags win over the file. COMMAND
        replaces what the image would run.

        \b
        vcnode pod run --id web --image busybox --memory 256 -- httpd -f
        vcnode pod run --id web3 --image busybox --publish 8080:80 --join blue -- httpd -f
        vcnode pod run --id web4 --image busybox -v /srv/www:/www:ro --tmpfs /tmp -- httpd -f -h /www
        vcnode pod run -f pod.toml --id web2
        echo '{"id": "p1", "containers": [{"image": "busybox"}]}' | vcnode pod run -f -
        """
    return """Prepare a pod; its VM does not run yet.

        The flags are those of 'vcnode pod run'. Then 'vcnode pod start' starts it with all its containers.

        \b
        vcnode pod create --id web --image busybox -- httpd -f
        vcnode pod create --id empty
        """


def _register(name: str, *, run: bool) -> None:
    async def create(
        cli: Cli,
        args: flags.Args = None,
        file: flags.SpecFile = None,
        pod_id: Id = None,
        image: flags.Image = None,
        rootfs: flags.Rootfs = None,
        container_id: ContainerId = None,
        memory: Memory = None,
        vcpus: Vcpus = None,
        env: flags.Env = None,
        workdir: flags.Workdir = None,
        user: flags.User = None,
        readonly: flags.Readonly = False,
        disk: flags.Disk = None,
        volume: flags.VolumesAndMounts = None,
        tmpfs: flags.Tmpfs = None,
        socket: flags.Sockets = None,
        cpus: flags.Cpus = None,
        mem_limit: flags.MemLimit = None,
        pids_limit: flags.PidsLimit = None,
        open_stdin: flags.OpenStdin = False,
        open_tty: flags.OpenTty = False,
        restart: flags.Restart = None,
        startup_probe: flags.StartupProbe = None,
        readiness_probe: flags.ReadinessProbe = None,
        liveness_probe: flags.LivenessProbe = None,
        restart_pod: flags.RestartPod = None,
        on_disconnect: flags.OnDisconnect = None,
        hostname: Hostname = None,
        template: TemplateOption = None,
        hypervisor: HypervisorOption = None,
        agent: AgentOption = None,
        network: NetworkOption = None,
        join: Join = None,
        netns: Netns = None,
        interworking: InterworkingOption = None,
        publish: Publish = None,
        rate_mbit: Rate = None,
        dns: Dns = None,
        label: flags.Label = None,
        annotation: flags.Annotation = None,
        command_id: flags.CommandId = None,
    ) -> None:
        from vcnode.cli import specs

        pod = specs.PodFlags(
            pod_id=pod_id,
            hostname=hostname,
            vcpus=vcpus,
            memory_mib=memory,
            hypervisor=hypervisor,
            agent=agent,
            network=network,
            restart=restart_pod,
            template=template,
            on_disconnect=on_disconnect,
            join=join or (),
            netns=netns,
            interworking=interworking,
            publish=publish or (),
            volumes=volume or (),
            sockets=socket or (),
            rate_mbit=rate_mbit,
            dns=dns or (),
            label=label or (),
            annotation=annotation or (),
        )
        container = specs.ContainerFlags(
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
            restart=restart,
            startup_probe=startup_probe,
            readiness_probe=readiness_probe,
            liveness_probe=liveness_probe,
            cmd=specs.CmdFlags(args=tuple(args or ()), env=tuple(env or ()), workdir=workdir, user=user),
        )
        spec = specs.pod_spec(flags.read_spec(file), pod, container)
        await _create_or_run(cli, run, spec, command_id)

    create.__doc__ = _creating(run)
    command(app, name)(create)


_register("create", run=False)
_register("run", run=True)


@command(app, "start")
async def start(cli: Cli, pod_id: flags.Pod, command_id: flags.CommandId = None) -> None:
    """Start a pod's VM and all its containers.

    \b
    vcnode pod start web
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_start(pod_id, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.pod)


@command(app, "stop")
async def stop(
    cli: Cli, pod_id: flags.Pod, grace: flags.Grace = None, command_id: flags.CommandId = None
) -> None:
    """Stop a pod's containers and its VM; the pod stays and can be started again.

    \b
    vcnode pod stop web
    vcnode pod stop --grace 0 web      kills at once
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_stop(
            pod_id, grace_s=grace, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.pod_stopped)


@command(app, "pause")
async def pause(cli: Cli, pod_id: flags.Pod, command_id: flags.CommandId = None) -> None:
    """Stop a pod's virtual CPUs. Its memory stays, and nothing in it can be reached until 'pod resume'.

    \b
    vcnode pod pause web
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_pause(pod_id, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.pod)


@command(app, "resume")
async def resume(cli: Cli, pod_id: flags.Pod, command_id: flags.CommandId = None) -> None:
    """Let a paused pod run again. Its clock is set; its timers go on where they stood.

    \b
    vcnode pod resume web
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_resume(pod_id, command_id=command_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.pod)


@command(app, "resize")
async def resize(
    cli: Cli,
    pod_id: flags.Pod,
    memory: Annotated[
        int, typer.Option("--memory", metavar="MIB", help="Memory that it is to have.", show_default=False)
    ],
    command_id: flags.CommandId = None,
) -> None:
    """Change a running pod's memory, within what its VM was started with.

    Only for pods that were created with '--template never': others share memory with a template.

    \b
    vcnode pod resize --memory 256 big
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_resize(
            pod_id, memory, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.pod)


@command(app, "attach-volume")
async def attach_volume(
    cli: Cli,
    pod_id: flags.Pod,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Its name in the pod.")],
    host_path: Annotated[
        str | None, typer.Option("--host-path", metavar="DIR", help="Directory on the node's host.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="FILE", help="File on the node's host that is a disk.")
    ] = None,
    fs: Annotated[str | None, typer.Option("--fs", help="File system of that: ext4 or erofs.")] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Nothing in it can write there.")] = False,
    command_id: flags.CommandId = None,
) -> None:
    """Add a volume to a pod, which may be running. Containers that are created later can mount it.

    \b
    vcnode pod attach-volume web data --host-path /srv/data
    vcnode pod attach-volume web disk --device /srv/disk.img --fs ext4
    vcnode container create web --id more --image busybox -v data:/data -- sleep 60
    """
    from vcnode.cli import specs, views
    from vcnode.models.volumes import Volume

    data = {"mount_tag": tag, "host_path": host_path, "device": device, "fs": fs, "read_only": read_only}
    volume = specs.model(Volume, data, "The volume is not described right.")
    async with cli.node() as node:
        reply = await node.pod_attach_volume(
            pod_id, volume, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.pod)


@command(app, "detach-volume")
async def detach_volume(
    cli: Cli,
    pod_id: flags.Pod,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Its name in the pod.")],
    command_id: flags.CommandId = None,
) -> None:
    """Take a volume away from a pod. No container may mount it.

    \b
    vcnode pod detach-volume web data
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_detach_volume(
            pod_id, tag, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.pod)


@command(app, "delete")
async def delete(
    cli: Cli, pod_id: flags.Pod, force: flags.Force = False, command_id: flags.CommandId = None
) -> None:
    """Free everything that a pod holds, and forget it. It must not be running, unless --force stops it first.

    Deleting what does not exist succeeds, so it can be repeated.

    \b
    vcnode pod delete web
    vcnode pod delete --force web
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_delete(
            pod_id, force=force, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, views.pod_deleted)


@command(app, "list")
async def list_(
    cli: Cli,
    label: flags.Label = None,
    states: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Only pods in this state.")
    ] = None,
    annotation: flags.Annotation = None,
) -> None:
    """List the pods of a node.

    \b
    vcnode pod list
    vcnode pod list --state running --label app=web
    vcnode pod list -o json | jq -r '.pods[].pod_id'
    """
    from vcnode.cli import specs, views
    from vcnode.models.commands import PodList

    wanted = {
        "labels": specs.pairs(label or (), "--label"),
        "annotations": specs.pairs(annotation or (), "--annotation"),
        "states": states or [],
    }
    request = specs.model(PodList, wanted, "No such state.")
    async with cli.node() as node:
        reply = await node.pod_list(
            labels=request.labels,
            annotations=request.annotations,
            states=request.states,
            deadline_s=cli.options.deadline_s,
        )
    cli.show(reply, views.pods)


@command(app, "status")
async def status(cli: Cli, pod_id: flags.Pod) -> None:
    """Show all that the node knows of a pod.

    \b
    vcnode pod status web
    vcnode pod status web -o json
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_status(pod_id, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.pod)


@command(app, "console")
async def console(
    cli: Cli,
    pod_id: flags.Pod,
    size: Annotated[
        int, typer.Option("--bytes", metavar="N", min=1, max=256 * 1024, help="Most bytes: the last ones.")
    ] = 64 * 1024,
) -> None:
    """Show what the guest of a running pod wrote to its console: firmware, kernel, programs.

    \b
    vcnode pod console web
    vcnode pod console --bytes 1000 web
    """
    from vcnode.cli import views

    async with cli.node() as node:
        reply = await node.pod_console(pod_id, max_bytes=size, deadline_s=cli.options.deadline_s)
    cli.show(reply, views.console)


@command(app, "exec", failure=Exit.EXEC_FAILED, context_settings={"allow_interspersed_args": False})
async def exec_(
    cli: Cli,
    pod_id: flags.Pod,
    args: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Program and arguments.")],
    env: flags.Env = None,
    workdir: flags.Workdir = None,
    user: flags.User = None,
    stdin: flags.StdinFirst = False,
    timeout: flags.ExecTimeout = None,
    command_id: flags.CommandId = None,
) -> int:
    """Run a command in a pod's guest itself, outside all containers. Options go before POD.

    Ends with the command's exit code; 124 when it was killed at --timeout, 125 when vcnode failed.

    \b
    vcnode pod exec web -- cat /proc/meminfo
    vcnode pod exec --timeout 5 web dmesg
    """
    from vcnode.cli import execs, specs

    described = specs.CmdFlags(args=execs.words(args), env=env or (), workdir=workdir, user=user)
    request = execs.arguments(described, stdin=stdin, timeout_s=timeout)
    async with cli.node() as node:
        reply = await node.pod_exec(
            pod_id, **request, command_id=command_id, deadline_s=cli.options.deadline_s
        )
    return execs.finish(cli, reply)
