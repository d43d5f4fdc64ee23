"""``network``: TCP between guest and host, for each way of wiring an interface to the VM.

The floor is the same guest on a tap of its own: no veth, no bridge, no filters. All pods are of one node
agent in a network of its own; the guest's side is busybox, the same for all.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from bench.options import Options
from bench.report import Result, Series
from vcnode import node as node_module
from vcnode.drivers import namespaces
from vcnode.drivers.network import ipam, links, taps
from vcnode.drivers.network.noop import NoopNetwork
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.network import (
    Endpoint,
    Interworking,
    NetworkConfig,
    NetworkInterface,
    NetworkInterfacePair,
    NetworkModel,
)
from vcnode.models.pod import Cmd, PodSpec
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.node import Node, running
from vcnode.settings import NatsSettings, QemuSettings, Settings

REACH = 1.3
FLOOR = "floor"
SUBNET = "10.200.0."
BOOT_LIMIT_S = 120.0
ECHO_PORT = 9


class TapNetwork(NoopNetwork):
    """A tap in the host's own network, with the gateway's address on it, and nothing else."""

    def netdev_count(self, config: NetworkConfig) -> int:
        """One."""
        return 1

    def check(self, config: NetworkConfig) -> None:
        """Anything goes."""

    def plan(self, request: NetworkRequest, held: Sequence[NetworkAttachment]) -> NetworkAttachment:
        """An endpoint whose other end is the tap itself."""
        mac = ipam.mac_of(request.vm_id, 0)
        interface = NetworkInterface(name="btap0", hard_addr=mac)
        pair = NetworkInterfacePair(
            id="floor", interworking=Interworking.TC, virt_iface=interface, tap_iface=interface
        )
        endpoint = Endpoint(id="floor", name="eth0", net_pair=pair, mac=mac, addresses=(f"{SUBNET}2/24",))
        return NetworkAttachment(
            model=NetworkModel.CNM, vm_id=request.vm_id, pod_id=request.pod_id, endpoints=(endpoint,)
        )

    async def attach(self, planned: NetworkAttachment, *, timeout_s: float) -> NetworkAttachment:
        """Make the tap."""

        async def make() -> None:
            taps.make("btap0")
            async with links.here() as netlink:
                link = await links.get(netlink, "btap0")
                await netlink.addr("add", index=link.index, address=f"{SUBNET}1", prefixlen=24)
                await netlink.link("set", index=link.index, state="up")

        await namespaces.run(None, make)
        return planned

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """Open it."""
        return [taps.open_for_qemu("btap0")]

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """Remove it."""

        async def remove() -> None:
            async with links.here() as netlink:
                await links.delete(netlink, "btap0")

        await namespaces.run(None, remove)


async def network(options: Options) -> Result:
    """Throughput and round trip of each interworking against a bare tap."""
    from tests.support.netns import private_network

    rounds, seconds, pings = (3, 0.5, 60) if options.quick else (8, 1.0, 300)
    real = node_module.choose_drivers

    def chosen(*arguments: Any, **options: Any) -> node_module.Drivers:
        drivers = real(*arguments, **options)
        return replace(drivers, networks={**drivers.networks, NetworkModel.CNM: TapNetwork()})

    with tempfile.TemporaryDirectory(prefix="vcb-", dir="/tmp") as place, private_network():
        settings = _settings(Path(place), options)
        with mock.patch.object(node_module, "choose_drivers", chosen):
            async with running(settings) as node:
                try:
                    hosts = await _pods(node)
                    sent, received, trips = await _measure(node, hosts, rounds, seconds, pings)
                finally:
                    for pod in node.pods.list({}, ()).pods:
                        await node.pods.delete(pod.pod_id, True, Call(f"d-{pod.pod_id}", "pod.delete"))
    return _result(sent, received, trips)


def _settings(place: Path, options: Options) -> Settings:
    return Settings(
        node_name="bench",
        state_dir=place / "s",
        run_dir=place / "r",
        guest_dir=options.guest_dir,
        allowed_roots=(place,),
        metrics_address="",
        stop_grace_s=0,
        network=NetworkModel.BRIDGE,
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg" if options.accel == "tcg" else "auto", boot_timeout_s=BOOT_LIMIT_S),
    )


async def _pods(node: Node) -> dict[str, tuple[str, str]]:
    """A pod of each kind; the addresses of the host and of the pod, by kind."""
    hosts: dict[str, tuple[str, str]] = {}
    for kind in (FLOOR, *Interworking):
        bare = kind == FLOOR
        spec = PodSpec(
            id=kind,
            network_model=NetworkModel.CNM if bare else NetworkModel.BRIDGE,
            network=NetworkConfig() if bare else NetworkConfig(interworking=Interworking(kind)),
            template="never",
        )
        status = await node.pods.run(spec, Call(f"r-{kind}", "pod.run"))
        record = node.pods._ledger.get(kind)
        assert record.network is not None, status
        pod = record.network.endpoints[0].addresses[0].partition("/")[0]
        hosts[kind] = (f"{SUBNET}1" if bare else "10.119.0.1", pod)
        await _sh(node, kind, f"(while :; do nc -l -p {ECHO_PORT} -e cat; done) >/dev/null 2>&1 &")
    return hosts


async def _sh(node: Node, pod_id: str, script: str) -> None:
    options = ExecOptions(cmd=Cmd(args=("/bin/busybox", "sh", "-c", script)), timeout_s=60)
    await node.pods.exec(pod_id, None, options, Call(f"x-{time.monotonic_ns()}", "container.exec"))


Samples = dict[str, list[float]]


async def _measure(
    node: Node, hosts: dict[str, tuple[str, str]], rounds: int, seconds: float, pings: int
) -> tuple[Samples, Samples, Samples]:
    """MB/s from the guest, MB/s to it, and milliseconds of a round trip, by kind; by turns."""
    sent: Samples = {kind: [] for kind in hosts}
    received: Samples = {kind: [] for kind in hosts}
    trips: Samples = {kind: [] for kind in hosts}
    for number in range(rounds + 1):
        for kind, (host, pod) in hosts.items():
            out = await _from_guest(node, kind, host, seconds)
            into = await _to_guest(node, kind, host, seconds)
            trip = await asyncio.to_thread(_round_trips, pod, pings)
            if number:  # the first one warms up
                sent[kind].append(out)
                received[kind].append(into)
                trips[kind].append(trip)
    return sent, received, trips


async def _from_guest(node: Node, pod_id: str, host: str, seconds: float) -> float:
    """MB/s that the guest sends."""

    def drain(server: socket.socket) -> float:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(30)
            connection.recv(65536)
            began, total = time.perf_counter(), 0
            while (now := time.perf_counter()) - began < seconds:
                total += len(connection.recv(1 << 20))
            return total / (now - began) / 1e6

    with socket.create_server((host, 0)) as server:
        server.settimeout(30)
        port = server.getsockname()[1]
        script = f"nc {host} {port} </dev/zero >/dev/null 2>&1 || true"
        rate, _ = await asyncio.gather(asyncio.to_thread(drain, server), _sh(node, pod_id, script))
    return rate


async def _to_guest(node: Node, pod_id: str, host: str, seconds: float) -> float:
    """MB/s that the guest receives."""

    def fill(server: socket.socket) -> float:
        connection, _ = server.accept()
        data = bytes(1 << 18)
        with connection:
            connection.settimeout(30)
            connection.sendall(data)
            began, total = time.perf_counter(), 0
            while (now := time.perf_counter()) - began < seconds:
                total += connection.send(data)
            return total / (now - began) / 1e6

    with socket.create_server((host, 0)) as server:
        server.settimeout(30)
        port = server.getsockname()[1]
        script = f"nc {host} {port} </dev/null >/dev/null 2>&1 || true"
        rate, _ = await asyncio.gather(asyncio.to_thread(fill, server), _sh(node, pod_id, script))
    return rate


def _round_trips(pod: str, count: int) -> float:
    """Median of so many round trips of one byte over TCP, in milliseconds."""
    deadline = time.monotonic() + 20
    while True:
        try:
            sock = socket.create_connection((pod, ECHO_PORT), timeout=20)
            break
        except ConnectionRefusedError:  # between two of its connections nc does not listen
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    samples = []
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began = time.perf_counter()
            sock.send(b"x")
            sock.recv(1)
            samples.append((time.perf_counter() - began) * 1000)
    return statistics.median(samples[count // 10 :])


def _result(sent: Samples, received: Samples, trips: Samples) -> Result:
    series = [Series(f"guest to host, {kind}", "MB/s", tuple(found)) for kind, found in sent.items()]
    series += [Series(f"host to guest, {kind}", "MB/s", tuple(found)) for kind, found in received.items()]
    series += [Series(f"round trip, {kind}", "ms", tuple(found)) for kind, found in trips.items()]
    ratios = {
        kind: {
            "sent": round(statistics.median(sent[FLOOR]) / statistics.median(sent[kind]), 3),
            "received": round(statistics.median(received[FLOOR]) / statistics.median(received[kind]), 3),
            "round_trip": round(statistics.median(trips[kind]) / statistics.median(trips[FLOOR]), 3),
        }
        for kind in sent
        if kind != FLOOR
    }
    return Result(
        bench="network",
        ratio=max(ratios[Interworking.TC].values()),
        of="TCP between guest and host with tc: worst of both directions and the round trip / a tap alone",
        reach=REACH,
        series=series,
        facts={"ratios": ratios, "cpus": os.cpu_count()},
    )
