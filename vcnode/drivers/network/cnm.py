"""Protocol Network on a namespace that somebody else has made (``network_config.netns_path``), as in CNM.

Its interfaces that are up and have an address are wired to the VM, which takes their addresses over; nothing
of them is changed that is not put back with the pod's end. What that needs is on the disk before it changes.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from vcnode.aio import deadline_as
from vcnode.drivers import namespaces
from vcnode.drivers.audit import Held
from vcnode.drivers.network import interworking, links, resolver, scan
from vcnode.drivers.network.kept import Kept
from vcnode.drivers.network.links import doing
from vcnode.drivers.network.scan import Scanned
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NetworkError, UnsupportedError
from vcnode.models.network import Endpoint, NetworkConfig, NetworkModel
from vcnode.models.node import DriverInfo
from vcnode.models.vm import Data, NetworkAttachment, NetworkRequest
from vcnode.settings import CnmSettings

_MARK = "vcnode "
"""How the aliases of interfaces begin that are wired to a VM."""
_OF_VM = re.compile(r"vm-[0-9a-f]{12}(/.*)?")
_FIELD = "pod.network.netns_path"


class Taken(Data):
    """A namespace that a VM has, and what its interfaces were before."""

    vm_id: str
    """The VM."""
    netns_path: str
    """The namespace."""
    device: int
    """With `inode` its identity: another may appear under the same path."""
    inode: int
    """See `device`."""
    boot_id: str
    """The host's boot, after which the same numbers mean others."""
    interfaces: tuple[tuple[str, str | None], ...]
    """Name and alias of each interface that is wired, in the order of the VM's."""


class CnmNetwork:
    """Connects pods to what is in a given namespace.

    Args:
        settings: Where namespaces may be.
        state_dir: The node's; what must be put back is kept below it.
    """

    def __init__(self, settings: CnmSettings, state_dir: Path) -> None:
        self._settings = settings
        self._kept = Kept(state_dir / "cnm", Taken.model_validate_json)
        self._one = asyncio.Lock()
        """Held while a namespace is looked at and taken."""

    @property
    def info(self) -> DriverInfo:
        """Nothing beyond the minimum."""
        return DriverInfo(type=NetworkModel.CNM)

    async def open(self) -> None:
        """Nothing to look for but what a crash has left half written."""
        await asyncio.to_thread(self._kept.tidy)

    async def close(self) -> None:
        """Nothing to free."""

    # -- plan ----------------------------------------------------------------------------------------------

    def check(self, config: NetworkConfig) -> None:
        """See Protocol Network: a namespace in an allowed place, and nothing that its maker has to see to."""
        for field in ("networks", "ports", "rate_mbit"):
            if getattr(config, field) != getattr(NetworkConfig(), field):
                raise InvalidArgumentError.field(
                    f"pod.network.{field}",
                    "does not go with network_model cnm: it is up to who made the namespace",
                )
        if config.netns_path is None:
            raise InvalidArgumentError.field(_FIELD, "must be given with network_model cnm")
        self._below(os.path.normpath(config.netns_path), self._settings.allowed_dirs)

    def _below(self, path: str, directories: Sequence[Path]) -> None:
        """See that *path* is in one of *directories* and no namespace of a node agent's own."""
        for directory in directories:
            if Path(path).is_relative_to(directory) and path != str(directory):
                if _OF_VM.fullmatch(str(Path(path).relative_to(directory))):
                    raise InvalidArgumentError.field(_FIELD, "is the namespace of another pod")
                return
        allowed = ", ".join(map(str, self._settings.allowed_dirs)) or "nothing"
        raise InvalidArgumentError.field(
            _FIELD, f"must lie below {allowed} (cnm.allowed_dirs in the settings)"
        )

    def netdev_count(self, config: NetworkConfig) -> None:
        """See Protocol Network: only the namespace can tell."""

    def plan(self, request: NetworkRequest, held: Sequence[NetworkAttachment]) -> NetworkAttachment:
        """See Protocol Network: the namespace is taken."""
        self.check(request.config)
        path = os.path.normpath(request.config.netns_path or "")
        for other in held:
            if other.netns_path == path:
                raise FailedPreconditionError(
                    f"{_FIELD}: namespace {path} is pod {other.pod_id}'s.", field=_FIELD, pod_id=other.pod_id
                )
        return NetworkAttachment(
            model=NetworkModel.CNM,
            vm_id=request.vm_id,
            pod_id=request.pod_id,
            config=request.config,
            netns_path=path,
            netns_created=False,
            dns=resolver.complete(request.config.dns, ()),
        )

    # -- make ----------------------------------------------------------------------------------------------

    async def prepare(self, vm_id: str, netdev_count: int, *, timeout_s: float) -> NetworkAttachment:
        """Not offered: the namespace is the pod's."""
        raise UnsupportedError("Network model cnm makes nothing for VMs without a pod.")

    async def attach(self, planned: NetworkAttachment, *, timeout_s: float) -> NetworkAttachment:
        """See Protocol Network."""
        path = planned.netns_path or ""
        async with _limit(timeout_s, f"network of VM {planned.vm_id}"), self._one:
            found = await asyncio.to_thread(self._look_at, planned.vm_id, path)
            endpoints = await namespaces.run(path, lambda: self._take(planned, found))
        return planned.model_copy(update={"endpoints": endpoints})

    def _look_at(self, vm_id: str, path: str) -> os.stat_result:
        """The identity of a namespace, which may be used. Raises as `attach`."""
        allowed = [Path(os.path.realpath(directory)) for directory in self._settings.allowed_dirs]
        try:
            self._below(os.path.realpath(path), allowed)
            found = os.stat(path)
        except OSError as exc:
            raise FailedPreconditionError(
                f"{_FIELD}: {path} cannot be used: {exc.strerror}.", field=_FIELD
            ) from exc
        if not namespaces.exists(path):
            raise FailedPreconditionError(f"{_FIELD}: {path} is no network namespace.", field=_FIELD)
        if os.path.samestat(found, os.stat("/proc/self/ns/net")):
            raise InvalidArgumentError.field(_FIELD, "is the node agent's own network")
        for other in self._kept.find("").values():
            if other.vm_id != vm_id and (other.device, other.inode) == (found.st_dev, found.st_ino):
                raise FailedPreconditionError(
                    f"{_FIELD}: namespace {path} is that of VM {other.vm_id} already.", field=_FIELD
                )
        return found

    async def _take(self, planned: NetworkAttachment, found: os.stat_result) -> tuple[Endpoint, ...]:
        """Wire every interface that has an address, in a thread inside the namespace."""
        async with links.here() as netlink:
            every = await links.every(netlink)
            usable = [s for s in await scan.scan(netlink) if s.addresses and s.link.up]
            self._refuse(planned, every, usable)
            interfaces = tuple((s.link.name, s.link.alias) for s in usable)
            taken = Taken(
                vm_id=planned.vm_id,
                netns_path=planned.netns_path or "",
                device=found.st_dev,
                inode=found.st_ino,
                boot_id=_boot_id(),
                interfaces=interfaces,
            )
            self._kept.save(planned.vm_id, taken)
            endpoints = []
            for index, scanned in enumerate(usable):
                pair = await interworking.wire(
                    netlink,
                    scanned.link,
                    planned.config.interworking,
                    index=index,
                    pair_id=f"{planned.vm_id}-{index}",
                )
                endpoints.append(scan.endpoint(scanned, pair))
            return tuple(endpoints)

    def _refuse(
        self, planned: NetworkAttachment, every: Sequence[links.Link], usable: Sequence[Scanned]
    ) -> None:
        """Raise FailedPreconditionError when these interfaces cannot be wired."""
        path = planned.netns_path
        if not usable:
            problem = "has no interface that is up and has an address"
        elif (obstacle := scan.find_obstacle(usable)) is not None:
            problem = obstacle
        elif wired := [link.name for link in every if (link.alias or "").startswith(_MARK)]:
            problem = f"is a VM's already: {wired[0]} is wired to one"
        elif taken := {link.name for link in every} & _names(len(usable)):
            problem = f"has an interface {min(taken)}, a name that is needed for the VM"
        else:
            return
        raise FailedPreconditionError(f"{_FIELD}: namespace {path} {problem}.", field=_FIELD)

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """See Protocol Network."""
        pairs = [e.net_pair for e in attachment.endpoints if e.net_pair is not None]
        return await interworking.open_taps(attachment.netns_path or "", pairs)

    # -- unmake --------------------------------------------------------------------------------------------

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See Protocol Network: the namespace is as it was, if it is still there."""
        vm_id = attachment.vm_id
        async with _limit(timeout_s, f"removal of the network of VM {vm_id}"):
            for taken in (await asyncio.to_thread(self._kept.find, vm_id)).values():
                if await asyncio.to_thread(_same, taken):
                    await namespaces.run(taken.netns_path, partial(_put_back, taken))
                await asyncio.to_thread(self._kept.remove, taken.vm_id)

    # -- recover and audit ---------------------------------------------------------------------------------

    async def recover(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See Protocol Network: nothing can be mended."""
        path = attachment.netns_path or ""
        taken = (await asyncio.to_thread(self._kept.find, attachment.vm_id)).get(attachment.vm_id)
        if taken is None or not await asyncio.to_thread(_same, taken):
            raise NetworkError(f"The network namespace {path} of VM {attachment.vm_id} is gone.")

        wanted = {name for e in attachment.endpoints for name in (e.name, e.tap_name) if name is not None}

        async def missing() -> set[str]:
            async with links.here() as netlink:
                there = {link.name for link in await links.every(netlink)}
            return wanted - there

        if lost := await namespaces.run(path, missing):
            raise NetworkError(f"Namespace {path} has lost {', '.join(sorted(lost))}.")

    async def held(self, mark: str) -> Sequence[Held]:
        """See Protocol Auditable: every namespace that has to be put back."""
        names = await asyncio.to_thread(self._kept.names, mark)
        return [Held("cnm", str(self._kept.path(name)), name) for name in names]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See Protocol Auditable."""
        if held.vm_id is not None:
            await self.detach(
                NetworkAttachment(model=NetworkModel.CNM, vm_id=held.vm_id), timeout_s=timeout_s
            )


def _limit(timeout_s: float, what: str) -> AbstractAsyncContextManager[None]:
    late = NetworkError(f"The {what} took longer than {timeout_s:g} s.")
    return deadline_as(timeout_s, lambda: late)


def _names(count: int) -> set[str]:
    """Interfaces that wiring so many makes."""
    makers = (interworking.tap_name, interworking.bridge_name)
    return {maker(index) for index in range(count) for maker in makers}


def _same(taken: Taken) -> bool:
    """Whether that very namespace is still there."""
    try:
        found = os.stat(taken.netns_path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino, _boot_id()) == (taken.device, taken.inode, taken.boot_id)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def _put_back(taken: Taken) -> None:
    async with links.here() as netlink:
        for index, (name, alias) in enumerate(taken.interfaces):
            link = await links.find(netlink, name)
            if link is not None and not (link.alias or "").startswith(_MARK):
                continue  # not wired yet, or put back already: what is called tap0 is not ours
            await interworking.unwire(netlink, name, index=index)
            if alias and (link := await links.find(netlink, name)) is not None and link.alias != alias:
                with doing(f"put the alias of {name} back"):
                    await netlink.link("set", index=link.index, ifalias=alias)
