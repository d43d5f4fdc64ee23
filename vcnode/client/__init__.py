"""The SDK: drive nodes from Python.

::

    async with await Client.connect("nats://127.0.0.1:4222") as client:
        node = client.node("host-1")
        pod = await node.pod_run(PodSpec(id="web", containers=(ContainerSpec(image="busybox", cmd=...),)))
        async with client.events(pods=["web"], since="all") as events:
            async for event in events:
                print(event.kind, event.data)

Errors of a node come out as the classes of `vcnode.errors`, with ``error_id`` in their details.
"""

from vcnode.client.client import Client
from vcnode.client.events import EventStream
from vcnode.client.fleet import Fleet, Placement
from vcnode.client.node import NodeClient

__all__ = ["Client", "EventStream", "Fleet", "NodeClient", "Placement"]
