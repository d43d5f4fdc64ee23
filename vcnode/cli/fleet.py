"""``vcnode place``, ``vcnode nodes``, ``vcnode pods``: many nodes as one; and ``vcnode pod bid``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command
from vcnode.cli.exits import Exit

if TYPE_CHECKING:
    from vcnode.models.fleet import Constraints
    from vcnode.models.pod import PodSpec

Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="KEY=VALUE", help="Label that the node must carry; may be repeated."),
]
Tolerate = Annotated[
    list[str] | None,
    typer.Option("--tolerate", metavar="TAINT", help="Taint that does not matter; may be repeated."),
]
Avoid = Annotated[
    list[str] | None,
    typer.Option("--avoid", metavar="KEY=VALUE", help="Keep away from pods that carry all of these labels."),
]
SpreadBy = Annotated[
    str | None, typer.Option("--spread-by", metavar="KEY", help="Label of the pod whose equals are spread.")
]
Id = Annotated[str | None, typer.Option("--id", metavar="ID", help="Pod id; one is made otherwise.")]
Memory = Annotated[int | None, typer.Option("--memory", metavar="MIB", min=1, help="Memory of the VM.")]
Vcpus = Annotated[int | None, typer.Option("--vcpus", metavar="N", min=1, help="Virtual CPUs of the VM.")]


def _spec(
    file: str | None,
    pod_id: str | None,
    image: str | None,
    memory: int | None,
    vcpus: int | None,
    label: list[str] | None,
    args: list[str] | None,
) -> PodSpec:
    from vcnode.cli import specs

    pod = specs.PodFlags(pod_id=pod_id, memory_mib=memory, vcpus=vcpus, label=label or ())
    container = specs.ContainerFlags(image=image, cmd=specs.CmdFlags(args=tuple(args or ())))
    return specs.pod_spec(flags.read_spec(file), pod, container)


def _constraints(
    require: list[str] | None, tolerate: list[str] | None, avoid: list[str] | None, spread_by: str | None
) -> Constraints:
    from vcnode.cli import specs
    from vcnode.models.fleet import Constraints

    fields = {
        "labels": specs.pairs(require or (), "--require"),
        "tolerations": tolerate or [],
        "anti_affinity": specs.pairs(avoid or (), "--avoid"),
        "spread_by": spread_by,
    }
    return specs.model(Constraints, fields, "The constraints are wrong")


def register(app: typer.Typer, pod_app: typer.Typer) -> None:
    """Add the commands: to the root, and ``bid`` to ``pod``."""

    @command(app, "place")
    async def place(
        cli: Cli,
        args: flags.Args = None,
        file: flags.SpecFile = None,
        pod_id: Id = None,
        image: flags.Image = None,
        memory: Memory = None,
        vcpus: Vcpus = None,
        label: flags.Label = None,
        require: Require = None,
        tolerate: Tolerate = None,
        avoid: Avoid = None,
        spread_by: SpreadBy = None,
    ) -> None:
        """Run a pod on the node that bids best.

        Describe it as for 'vcnode pod run'. Ends with 6 when no node can take it: 'vcnode pod bid' with the
        same flags tells why.

        \b
        vcnode place --image busybox --memory 256 -- httpd -f
        vcnode place -f pod.toml --require zone=a --avoid app=db --spread-by app
        """
        from vcnode.cli import fleet_views
        from vcnode.client import Fleet

        spec = _spec(file, pod_id, image, memory, vcpus, label, args)
        constraints = _constraints(require, tolerate, avoid, spread_by)
        async with cli.client() as client:
            placed = await Fleet(client).place(spec, constraints, deadline_s=cli.options.deadline_s)
        cli.show(placed.pod, lambda pod: fleet_views.placed(placed))

    @command(pod_app, "bid")
    async def bid(
        cli: Cli,
        args: flags.Args = None,
        file: flags.SpecFile = None,
        pod_id: Id = None,
        image: flags.Image = None,
        memory: Memory = None,
        vcpus: Vcpus = None,
        label: flags.Label = None,
        require: Require = None,
        tolerate: Tolerate = None,
        avoid: Avoid = None,
        spread_by: SpreadBy = None,
    ) -> int:
        """Ask all nodes, or the one named by --node, whether they could run a pod, and why not.

        Nothing is started and nothing kept. Ends with 6 when no node could.

        \b
        vcnode pod bid --image busybox --memory 4096
        vcnode pod bid -f pod.toml --require zone=a
        """
        from vcnode.cli import fleet_views
        from vcnode.client import Fleet

        spec = _spec(file, pod_id, image, memory, vcpus, label, args)
        constraints = _constraints(require, tolerate, avoid, spread_by)
        async with cli.client() as client:
            if cli.options.node:
                node = client.node(cli.options.node)
                bids = [await node.pod_bid(spec, constraints, hold_s=0, deadline_s=cli.options.deadline_s)]
            else:
                bids = list(await Fleet(client).bids(spec, constraints, explain=True))
        if cli.json:
            for each in bids:
                print(each.model_dump_json())
        else:
            fleet_views.bids(bids)
        return Exit.OK if any(each.able for each in bids) else Exit.EXHAUSTED

    @command(pod_app, "release")
    async def release(
        cli: Cli, reservation: Annotated[str, typer.Argument(metavar="RESERVATION", help="Of a bid.")]
    ) -> None:
        """Give up what a bid has kept; it would expire by itself, too.

        \b
        vcnode pod release r-0123456789abcdef01234567 --node host1
        """
        async with cli.node() as node:
            reply = await node.pod_release(reservation, deadline_s=cli.options.deadline_s)
        cli.show(reply, lambda r: print("released" if r.existed else "there was none"))

    @command(app, "nodes")
    async def nodes(cli: Cli) -> None:
        """List the nodes of the fleet by their leases: state, and what pods have of them.

        \b
        vcnode nodes
        vcnode nodes -o json
        """
        from vcnode.cli import fleet_views
        from vcnode.client import Fleet

        async with cli.client() as client, Fleet(client) as fleet:
            leases = [node.lease for _, node in sorted(fleet.nodes.items())]
        if cli.json:
            for lease in leases:
                print(lease.model_dump_json())
        else:
            fleet_views.nodes(leases)

    @command(app, "pods")
    async def pods(
        cli: Cli,
        everything: Annotated[
            bool, typer.Option("--all", "-a", help="Also pods that do not run, and those of lost nodes.")
        ] = False,
    ) -> None:
        """List the pods of all nodes that run or start.

        \b
        vcnode pods
        vcnode pods --all --node host1
        """
        from vcnode.cli import fleet_views
        from vcnode.client import Fleet

        async with cli.client() as client, Fleet(client) as fleet:
            found = [
                status
                for (node, _), status in sorted(fleet.pods.items())
                if (cli.options.node or node) == node
                and (everything or (node in fleet.nodes and fleet_views.is_active(status)))
            ]
        if cli.json:
            for status in found:
                print(status.model_dump_json())
        else:
            fleet_views.pods(found)
