"""Protocol Network on CNI plugins.

::

    guest eth0 ── tap0 ═══ eth0 ── whatever the plugins have made
                  namespace of the pod

The namespace is the node's; each network of the pod is one ADD for an interface in it, which is then wired to
the VM. The guest gets what the kernel says the interface has; the plugins' results are needed for name
resolution only. What ADD is called with is on the disk before the call, and stays until DEL has succeeded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from vcnode.aio import deadline_as
from vcnode.drivers import namespaces
from vcnode.drivers.audit import Held
from vcnode.drivers.network import interworking, ipam, links, listeners, resolver, scan
from vcnode.drivers.network.cni import config
from vcnode.drivers.network.cni.results import Result
from vcnode.drivers.network.cni.runtime import Attachment, Runtime
from vcnode.drivers.network.kept import Kept
from vcnode.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NetworkError,
    UnsupportedError,
    VcnodeError,
)
from vcnode.models.network import (
    DnsConfig,
    Endpoint,
    Interworking,
    NetworkConfig,
    NetworkModel,
)
from vcnode.models.node import DriverInfo
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import CniSettings

log = logging.getLogger(__name__)

PORTS, BANDWIDTH, MAC, DNS = "portMappings", "bandwidth", "mac", "dns"
"""Capabilities that are used. Source: https://www.cni.dev/docs/conventions/."""
_BURST_S = 0.05
_MIN_BURST_BITS = 1_000_000
_MAX_BURST_BITS = 2**32 - 1


class CniNetwork:
    """Connects pods to networks of CNI plugins.

    Args:
        settings: Where configurations and plugins are.
        state_dir: The node's; what must be undone is kept below it.
    """

    def __init__(self, settings: CniSettings, state_dir: Path) -> None:
        self._settings = settings
        self._runtime = Runtime(settings.bin_dirs, timeout_s=settings.timeout_s)
        self._kept = Kept(state_dir / "cni", Attachment.model_validate_json)
        self._notes: tuple[str, ...] = ()
        self._capabilities: tuple[str, ...] = ()

    @property
    def info(self) -> DriverInfo:
        """``ports`` and ``rate_mbit`` where a network has plugins for that, as far as ``open`` has seen."""
        return DriverInfo(type=NetworkModel.CNI, capabilities=self._capabilities, notes=self._notes)

    async def open(self) -> None:
        """See Protocol Network. Configurations are read again for each pod."""
        await asyncio.to_thread(self._kept.tidy)
        found = await self._load()
        declared = frozenset[str]().union(*(network.capabilities for network in found.networks))
        offered = {"ports": PORTS, "rate_mbit": BANDWIDTH}
        self._capabilities = tuple(name for name, needed in offered.items() if needed in declared)
        self._notes = found.problems if self._settings.conf_dir.exists() else ()
        if self._settings.gc:
            await self._collect(found)

    async def examine(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Ask all plugins whether they are there and ready; changes nothing.

        Returns:
            Names of the networks that pods can join, the default first; and what is wrong, one sentence each.
        """
        found = await self._load()
        ready: list[str] = []
        problems = list(found.problems)
        for network in found.networks:
            try:
                version = await self._runtime.agree(network)
                await self._runtime.status(network, version)
            except NetworkError as exc:
                problems.append(exc.message)
            else:
                ready.append(network.name)
        return tuple(ready), tuple(problems)

    async def _load(self) -> config.Directory:
        return await asyncio.to_thread(config.load, self._settings.conf_dir)

    async def _collect(self, found: config.Directory) -> None:
        """Let plugins forget what is nobody's any more; a failure is noted and no more."""
        try:
            valid = await asyncio.to_thread(self._kept.find, "")
        except NetworkError as exc:  # what it would have named must not be collected
            self._notes += (exc.message,)
            return
        for network in found.networks:
            mine = [a for a in valid.values() if a.network.get("name") == network.name]
            try:
                await self._runtime.collect(network, await self._runtime.agree(network), mine)
            except NetworkError as exc:
                self._notes += (exc.message,)

    async def close(self) -> None:
        """Nothing to free."""

    # -- plan ----------------------------------------------------------------------------------------------

    def check(self, config: NetworkConfig) -> None:
        """See Protocol Network. Which networks there are is seen when the pod starts."""
        if config.netns_path is not None:
            raise InvalidArgumentError.field("pod.network.netns_path", "goes with network_model cnm only")

    def netdev_count(self, config: NetworkConfig) -> int:
        """See Protocol Network: one for each network."""
        return max(1, len(config.networks))

    def plan(self, request: NetworkRequest, held: Sequence[NetworkAttachment]) -> NetworkAttachment:
        """See Protocol Network: ports are taken; addresses are the plugins' to choose."""
        self.check(request.config)
        ipam.check_ports(request.config, held)
        return NetworkAttachment(
            model=NetworkModel.CNI,
            vm_id=request.vm_id,
            pod_id=request.pod_id,
            config=request.config,
            netns_path=namespaces.path_of(request.vm_id),
            dns=request.config.dns,
        )

    # -- make ----------------------------------------------------------------------------------------------

    async def prepare(self, vm_id: str, netdev_count: int, *, timeout_s: float) -> NetworkAttachment:
        """Not offered: plugins want to know the pod."""
        raise UnsupportedError("Network model cni makes nothing for VMs without a pod.")

    async def attach(self, planned: NetworkAttachment, *, timeout_s: float) -> NetworkAttachment:
        """See Protocol Network."""
        async with _limit(timeout_s, f"network of VM {planned.vm_id}"):
            wanted = await self._choose(planned)
            if planned.config.ports:
                await namespaces.run_blocking(None, lambda: listeners.check(planned.config.ports))
            await namespaces.run_blocking(None, lambda: _make_namespace(planned.vm_id))
            answers = [await self._add(attachment) for attachment in wanted]
            endpoints = await namespaces.run(
                namespaces.path_of(planned.vm_id),
                lambda: _wire(planned, [(a.if_name, str(a.network["name"])) for a in wanted]),
            )
        return planned.model_copy(update={"endpoints": endpoints, "dns": _dns(planned.config.dns, answers)})

    async def _choose(self, planned: NetworkAttachment) -> list[Attachment]:
        """The attachments of a pod, all of them known to be possible."""
        found = await self._load()
        names: Sequence[str | None] = planned.config.networks or (None,)
        networks = [found.find(name) for name in names]
        runtimes = _runtime_configs(planned, networks)
        return [
            Attachment(
                container_id=planned.vm_id,
                if_name=f"eth{index}",
                netns_path=namespaces.path_of(planned.vm_id),
                args=(("IgnoreUnknown", "1"), ("VCNODE_POD_ID", planned.pod_id or "")),
                network=network.dump(),
                version=await self._runtime.agree(network),
                runtime=runtime,
            )
            for index, (network, runtime) in enumerate(zip(networks, runtimes, strict=True))
        ]

    async def _add(self, attachment: Attachment) -> Result:
        name = _record(attachment)
        await asyncio.to_thread(self._kept.save, name, attachment)
        raw, result = await self._runtime.add(attachment)
        done = attachment.model_copy(update={"result": raw})
        await asyncio.to_thread(self._kept.save, name, done)
        return result

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """See Protocol Network."""
        pairs = [e.net_pair for e in attachment.endpoints if e.net_pair is not None]
        return await interworking.open_taps(namespaces.path_of(attachment.vm_id), pairs)

    # -- unmake --------------------------------------------------------------------------------------------

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See Protocol Network. The namespace goes once every DEL has succeeded: some look into it."""
        vm_id = attachment.vm_id
        async with _limit(timeout_s, f"removal of the network of VM {vm_id}"):
            kept = await asyncio.to_thread(self._kept.find, f"{vm_id}.")
            path = namespaces.path_of(vm_id)
            exists = await asyncio.to_thread(namespaces.exists, path)
            failed: VcnodeError | None = None
            if kept and exists:
                try:
                    await namespaces.run(path, _unwire)
                except VcnodeError as exc:  # a DEL that is owed comes all the same
                    failed = exc
            for name, added in reversed(kept.items()):
                try:
                    await self._runtime.delete(added, netns_exists=exists)
                    await asyncio.to_thread(self._kept.remove, name)
                except VcnodeError as exc:
                    log.warning("VM %s: %s", vm_id, exc.message, exc_info=exc)
                    failed = failed or exc
            if failed is not None:
                raise failed
            await asyncio.to_thread(namespaces.remove, vm_id)

    # -- recover and audit ---------------------------------------------------------------------------------

    async def recover(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See Protocol Network: the plugins are asked (CHECK), and nothing can be mended."""
        path = namespaces.path_of(attachment.vm_id)
        if not namespaces.exists(path):
            raise NetworkError(f"The network namespace of VM {attachment.vm_id} is gone.")
        if attachment.config.interworking is Interworking.BRIDGED:
            return  # the interface has another MAC in the meantime, which plugins would complain about
        async with _limit(timeout_s, f"check of the network of VM {attachment.vm_id}"):
            for added in (await asyncio.to_thread(self._kept.find, f"{attachment.vm_id}.")).values():
                await self._runtime.check(added)

    async def held(self, mark: str) -> Sequence[Held]:
        """See Protocol Auditable: every ADD that wants its DEL. The bridge lists all namespaces."""
        names = await asyncio.to_thread(self._kept.names, mark)
        return [Held("cni", str(self._kept.path(name)), name.partition(".")[0]) for name in names]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See Protocol Auditable: with one thing of a VM, all that it has is removed."""
        if held.vm_id is not None:
            known = NetworkAttachment(model=NetworkModel.CNI, vm_id=held.vm_id)
            await self.detach(known, timeout_s=timeout_s)


def _record(attachment: Attachment) -> str:
    return f"{attachment.container_id}.{attachment.if_name}"


def _limit(timeout_s: float, what: str) -> AbstractAsyncContextManager[None]:
    late = NetworkError(f"The {what} took longer than {timeout_s:g} s.")
    return deadline_as(timeout_s, lambda: late)


def _runtime_configs(planned: NetworkAttachment, networks: Sequence[config.Network]) -> list[dict[str, Any]]:
    """What each network's plugins are told at run time.

    Raises:
        FailedPreconditionError: No plugin would see to what the pod wants.
    """
    asked = planned.config
    ports_go_to = next((n for n, network in enumerate(networks) if PORTS in network.capabilities), None)
    if asked.ports and ports_go_to is None:
        raise _lacking("ports", PORTS, networks[0])
    configs: list[dict[str, Any]] = []
    for index, network in enumerate(networks):
        runtime: dict[str, Any] = {MAC: ipam.mac_of(planned.vm_id, index)}
        if asked.ports and index == ports_go_to:
            runtime[PORTS] = [
                {"hostPort": port.host, "containerPort": port.container, "protocol": port.protocol}
                for port in asked.ports
            ]
        if rates := _rates(asked):
            if BANDWIDTH not in network.capabilities:
                raise _lacking("rate_mbit", BANDWIDTH, network)
            runtime[BANDWIDTH] = rates
        if asked.dns != DnsConfig():
            runtime[DNS] = {
                "servers": list(asked.dns.servers),
                "searches": list(asked.dns.search),
                "options": list(asked.dns.options),
            }
        configs.append(runtime)
    return configs


def _lacking(field: str, capability: str, network: config.Network) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"pod.network.{field}: CNI network {network.name} has no plugin with the capability {capability}; "
        "add one to its configuration.",
        field=f"pod.network.{field}",
        network=network.name,
    )


def _rates(asked: NetworkConfig) -> dict[str, int]:
    """As the plugin bandwidth wants them, in bits per second and bits."""
    rates: dict[str, int] = {}
    for direction in ("ingress", "egress"):
        mbit: float | None = getattr(asked.rate_mbit, direction)
        if mbit is not None:
            bits = int(mbit * 1_000_000)
            rates[f"{direction}Rate"] = bits
            rates[f"{direction}Burst"] = min(max(int(bits * _BURST_S), _MIN_BURST_BITS), _MAX_BURST_BITS)
    return rates


def _dns(asked: DnsConfig, answers: Sequence[Result]) -> DnsConfig:
    """What was asked for, then what the plugins say, then the host's own."""
    for answer in answers:
        said = answer.dns.config() if answer.dns is not None else DnsConfig()
        if said.servers and not asked.servers:
            return asked.model_copy(
                update={
                    "servers": said.servers,
                    "search": asked.search or said.search,
                    "options": asked.options or said.options,
                }
            )
    return resolver.complete(asked, ())


# -- in threads of `namespaces` ------------------------------------------------------------------------


def _make_namespace(vm_id: str) -> None:
    """A namespace with its loopback up; that of a spare is there already."""

    async def raise_loopback() -> None:
        async with links.here() as netlink:
            await netlink.link("set", index=(await links.get(netlink, "lo")).index, state="up")

    def set_up() -> None:
        # The namespace of a spare has no IPv6, which plugins may want; and it is the guest that looks whether
        # an address is taken, so plugins need not wait a second for the kernel here.
        for name, value in (("disable_ipv6", "0"), ("accept_dad", "0")):
            for which in ("all", "default"):
                path = Path("/proc/sys/net/ipv6/conf", which, name)
                if path.exists():
                    path.write_text(value)
        namespaces.here(raise_loopback)

    if namespaces.exists(namespaces.path_of(vm_id)):
        namespaces.enter(namespaces.path_of(vm_id))
        set_up()
    else:
        namespaces.create(vm_id, set_up)


async def _wire(planned: NetworkAttachment, added: Sequence[tuple[str, str]]) -> tuple[Endpoint, ...]:
    """Wire the interface of each network to the VM, and what else the plugins have made with an address."""
    async with links.here() as netlink:
        found = {s.link.name: s for s in await scan.scan(netlink)}
        if missing := [f"{name} ({network})" for name, network in added if name not in found]:
            raise NetworkError(f"The CNI plugins of VM {planned.vm_id} have not made {', '.join(missing)}.")
        of_network: dict[str, str | None] = dict(added)
        others = [name for name, s in found.items() if name not in of_network and s.addresses]
        wanted = [found[name] for name in (*of_network, *others)]
        if (obstacle := scan.find_obstacle(wanted)) is not None:
            raise NetworkError(f"What the CNI plugins of VM {planned.vm_id} have made {obstacle}.")
        endpoints = []
        for index, scanned in enumerate(wanted):
            pair = await interworking.wire(
                netlink,
                scanned.link,
                planned.config.interworking,
                index=index,
                pair_id=f"{planned.vm_id}-{index}",
            )
            endpoints.append(scan.endpoint(scanned, pair, network=of_network.get(scanned.link.name)))
        return tuple(endpoints)


async def _unwire() -> None:
    """Put all interfaces back as the plugins made them, for their DEL."""
    async with links.here() as netlink:
        found = await links.every(netlink)
        for index, link in enumerate(found):
            await interworking.unwire(netlink, link.name, index=index)
