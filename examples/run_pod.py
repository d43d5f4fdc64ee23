"""Run a pod, look into it, delete it: python examples/run_pod.py [NODE [NATS_URL]]."""

import asyncio
import sys

from vcnode.client import Client
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec


async def main(node_name: str = "host1", url: str = "nats://127.0.0.1:4222") -> None:
    """Needs the image busybox on the node (README, tour)."""
    async with await Client.connect(url) as client:
        node = client.node(node_name)
        sleeper = ContainerSpec(id="main", image="busybox", cmd=Cmd(args=("sleep", "600")))
        await node.pod_run(PodSpec(id="from-python", containers=(sleeper,)))
        result = await node.container_exec("from-python", "main", ["uname", "-a"])
        print(result.exit_code, result.stdout.raw.decode())
        await node.pod_delete("from-python", force=True)


asyncio.run(main(*sys.argv[1:]))
