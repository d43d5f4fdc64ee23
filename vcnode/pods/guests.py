"""Guests of a pod's own: the files that they boot, how they get their addresses, and how they are reached."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import IPv4Interface, ip_interface

from vcnode.drivers.base import AgentAccess, Storage
from vcnode.errors import InvalidArgumentError, NotFoundError
from vcnode.models.hypervisor import HypervisorConfig
from vcnode.models.network import DnsConfig, Endpoint
from vcnode.models.pod import AgentType
from vcnode.models.records import PodRecord
from vcnode.models.vm import DiskFile, NetworkAttachment, VmConfig
from vcnode.pods.digests import verify
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.statuses import hostname_of

_FIELD = "pod.hypervisor_config"
_TELL_NOTHING = frozenset({AgentType.SSHD, AgentType.NOOP})
"""Agents whose guests have to get their addresses otherwise."""


@contextlib.asynccontextmanager
async def vm_config(parts: Parts, record: PodRecord, network: NetworkAttachment) -> AsyncIterator[VmConfig]:
    """How a pod's VM is built, with the files of its guest open inside the block: for its launch.

    Raises:
        InvalidArgumentError, NotFoundError: As `Storage.open_file` and `Storage.open_disk`; names the field.
        StorageError: The overlay of its disk image could not be made.
        FailedPreconditionError: A file is not what its digest says.
    """
    config = record.spec.hypervisor_config
    with contextlib.ExitStack() as ours:
        fds = {}
        for name, path in config.files.items():
            fds[name] = await open_guest_file(parts.storage, name, path)
            ours.callback(os.close, fds[name])
            await _verify(config, name, fds[name])
        disks = []
        if config.image_path is not None:
            disks.append(await open_image(parts.storage, config, overlay_id=record.disk_id))
            for fd in _descriptors(disks):
                ours.callback(os.close, fd)
            image = disks[0].fd if disks[0].base_fd is None else disks[0].base_fd
            await _verify(config, "image_path", image)
        named = {name: f"/proc/self/fd/{fd}" for name, fd in fds.items()}
        yield VmConfig(
            machine_type=config.machine_type,
            kernel=named.get("kernel_path"),
            initrd=named.get("initrd_path"),
            firmware=named.get("firmware_path"),
            file_fds=tuple(fds.values()),
            disks=tuple(disks),
            kernel_params=(*_addresses(record, network), *map(str, config.kernel_params)),
            hypervisor_params=tuple((param.key, param.value) for param in config.hypervisor_params),
            cpu_model=config.cpu_model,
            mem_prealloc=config.mem_prealloc,
            huge_pages=config.huge_pages,
            debug=config.debug,
        )


async def _verify(config: HypervisorConfig, name: str, fd: int) -> None:
    """Hold the file of field *name* against its digest, through the descriptor by which it is used."""
    if (digest := config.digest_of(name)) is not None:
        await asyncio.to_thread(verify, fd, digest, f"{_FIELD}.{name}")


def _descriptors(disks: Sequence[DiskFile]) -> Iterator[int]:
    for disk in disks:
        yield from (fd for fd in (disk.fd, disk.base_fd) if fd is not None)


async def check_files(storage: Storage, config: HypervisorConfig) -> None:
    """See that the files of a pod's guest can be opened; raises as `vm_config`. Nothing is made."""
    for name, path in config.files.items():
        os.close(await open_guest_file(storage, name, path))
    if config.image_path is not None:
        for fd in _descriptors([await open_image(storage, config, overlay_id=None)]):
            os.close(fd)


async def open_guest_file(storage: Storage, name: str, path: str) -> int:
    """Open the file in field *name* of a `HypervisorConfig`; raises as `vm_config`."""
    with _placed(f"{_FIELD}.{name}"):
        return await storage.open_file(path)


async def open_image(storage: Storage, config: HypervisorConfig, *, overlay_id: str | None) -> DiskFile:
    """Open the disk image of a `HypervisorConfig`; raises as `vm_config`."""
    with _placed(f"{_FIELD}.image_path"):
        return await storage.open_disk(
            config.image_path or "",
            config.format,
            writable=config.image_writable,
            overlay_id=overlay_id,
            timeout_s=REQUEST_LIMIT_S,
        )


@contextlib.contextmanager
def _placed(field: str) -> Iterator[None]:
    try:
        yield
    except NotFoundError as exc:
        raise NotFoundError(f"{field}: {exc.message}", **{**exc.details, "field": field}) from exc
    except InvalidArgumentError as exc:
        raise InvalidArgumentError.field(field, exc.message) from exc


def _addresses(record: PodRecord, network: NetworkAttachment) -> tuple[str, ...]:
    """Kernel parameters with the guest's addresses, where nobody in it could be told them otherwise."""
    config = record.spec.hypervisor_config
    if config.from_disk or not config.own_guest or record.agent_type not in _TELL_NOTHING:
        return ()
    return address_params(network.endpoints, hostname_of(record), network.dns)


def address_params(endpoints: Sequence[Endpoint], hostname: str, dns: DnsConfig) -> tuple[str, ...]:
    """``ip=`` for each interface with an IPv4 address, and ``net.ifnames=0`` for their names. Pure.

    Source: Linux, Documentation/admin-guide/nfs/nfsroot.rst; initramfs-tools and dracut read it as well.
    """
    servers = ":".join(server for server in dns.servers[:2] if ":" not in server)
    params = []
    for endpoint in endpoints:
        for address in map(ip_interface, endpoint.addresses):
            if isinstance(address, IPv4Interface):
                gateway = next(
                    (r.gateway for r in endpoint.routes if r.destination == "0.0.0.0/0" and r.gateway), ""
                )
                where = f"{address.ip}::{gateway}:{address.netmask}:{hostname}:{endpoint.name}:none"
                params.append(f"ip={where}" + (f":{servers}" if servers else ""))
                break  # an interface has one of these
    return (*params, "net.ifnames=0") if params else ()


async def access_of(parts: Parts, record: PodRecord, *, new_vm: bool = False) -> AgentAccess:
    """How the agent of a pod reaches its guest.

    Args:
        parts: The node's.
        record: The pod, with its network as it is now.
        new_vm: Whether the guest has just been booted: without a disk of its own it has made new keys then.

    Raises:
        InvalidArgumentError, NotFoundError: Its private key cannot be read; names the field.
    """
    key, path = None, record.spec.agent_config.sshd.private_key_file
    if record.agent_type is AgentType.SSHD and path is not None:
        with _placed("pod.agent_config.sshd.private_key_file"):
            key = await parts.storage.read_secret(path, private=True)
    keeps_keys = record.spec.hypervisor_config.image_path is not None
    return AgentAccess(
        config=record.spec.agent_config,
        endpoints=() if record.network is None else record.network.endpoints,
        private_key=key,
        host_key=record.host_key if keeps_keys or not new_vm else None,
    )
