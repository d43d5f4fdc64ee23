"""What a VM is launched with: network devices, from the taps of its network, and the files that it boots."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping

from vcnode.drivers.base import Network, Storage
from vcnode.errors import InvalidArgumentError, NotFoundError
from vcnode.models.network import NetworkModel
from vcnode.models.pod import HypervisorConfig
from vcnode.models.vm import NetDev, NetworkAttachment, VmConfig


@contextlib.asynccontextmanager
async def netdevs(network: Network, attachment: NetworkAttachment) -> AsyncIterator[tuple[NetDev, ...]]:
    """The devices of an attachment, with taps that are open inside the block: for the launch of its VM."""
    taps = await network.open_taps(attachment)
    try:
        yield tuple(NetDev(tap_fd=fd, mac=e.mac) for fd, e in zip(taps, attachment.endpoints, strict=True))
    finally:
        for fd in taps:
            os.close(fd)


@contextlib.asynccontextmanager
async def vm_config(storage: Storage, config: HypervisorConfig) -> AsyncIterator[VmConfig]:
    """What a pod's VM boots, with its files open inside the block: for its launch.

    Raises:
        InvalidArgumentError, NotFoundError: As `Storage.open_file`; names the field.
    """
    with contextlib.ExitStack() as ours:
        fds = {}
        for name, path in config.files.items():
            fds[name] = await open_guest_file(storage, name, path)
            ours.callback(os.close, fds[name])
        named = {name: f"/proc/self/fd/{fd}" for name, fd in fds.items()}
        yield VmConfig(
            kernel=named.get("kernel_path"), initrd=named.get("initrd_path"), file_fds=tuple(fds.values())
        )


async def open_guest_file(storage: Storage, name: str, path: str) -> int:
    """Open the file in field *name* of a `HypervisorConfig`; raises as `vm_config`."""
    field = f"pod.hypervisor_config.{name}"
    try:
        return await storage.open_file(path)
    except NotFoundError as exc:
        raise NotFoundError(f"{field}: {exc.message}", **{**exc.details, "field": field}) from exc
    except InvalidArgumentError as exc:
        raise InvalidArgumentError.field(field, exc.message) from exc


def preparer(
    networks: Mapping[NetworkModel, Network], default: NetworkModel, *, with_taps: bool
) -> Network | None:
    """The driver that makes the networks of VMs without a pod, the node's own first; None: there is none."""
    others = (networks[model] for model in NetworkModel if model in networks)
    offered = [networks[default], *others] if default in networks else list(others)
    for network in offered:
        if "spares" in network.info.capabilities and not (
            with_taps and network.info.type == NetworkModel.NOOP
        ):
            return network
    return None
