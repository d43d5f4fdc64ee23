"""Sockets of pods: each is made or connected on the host, and plugged into the VM as a serial port."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection

from vcnode.drivers.base import Storage
from vcnode.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from vcnode.models.node import DriverInfo
from vcnode.models.pod import PodSpec
from vcnode.models.records import PodRecord
from vcnode.models.vm import Port
from vcnode.pods.live import LivePod
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts

MAX_PATH_BYTES = 107
"""Of a socket at which programs connect by its path. Source: unix(7), sun_path."""


async def check_sockets(
    spec: PodSpec, hypervisor: DriverInfo, taken: Collection[str], storage: Storage
) -> None:
    """See that a pod can have its sockets. What is there at their paths is seen by the start alone.

    Args:
        spec: The pod.
        hypervisor: What its hypervisor can do.
        taken: Names of ports that its agent has.
        storage: Knows the allowed roots.

    Raises:
        UnsupportedError: The pod's hypervisor has no ports.
        InvalidArgumentError, NotFoundError: A name is taken, or a socket's path or directory cannot be used;
            names the field.
    """
    if spec.sockets and "ports" not in hypervisor.capabilities:
        raise UnsupportedError(
            f"pod.sockets: hypervisor_type {hypervisor.type} has no ports.", field="pod.sockets"
        )
    for number, socket in enumerate(spec.sockets):
        if socket.name in taken:
            raise InvalidArgumentError.field(
                f"pod.sockets[{number}].name", f"{socket.name} is the port of the pod's agent; take another"
            )
        field = f"pod.sockets[{number}].host_path"
        if socket.mode == "listen" and len(os.fsencode(socket.host_path)) > MAX_PATH_BYTES:
            raise InvalidArgumentError.field(
                field, f"has more than the {MAX_PATH_BYTES} bytes of a UNIX socket's path"
            )
        try:
            await storage.check_rootfs(posixpath.dirname(socket.host_path.rstrip("/")) or "/")
        except NotFoundError as exc:
            raise NotFoundError(f"{field}: {exc.message}", **{**exc.details, "field": field}) from exc
        except InvalidArgumentError as exc:
            raise InvalidArgumentError.field(field, exc.message) from exc


async def connect_sockets(parts: Parts, live: LivePod, record: PodRecord) -> None:
    """Connect them, for a start. What was made goes with the VM and its directory.

    Raises:
        InvalidArgumentError, NotFoundError, FailedPreconditionError, StorageError: As `Storage.listen` and
            `Storage.connect`.
        HypervisorError: QEMU did not take one.
    """
    for number, socket in enumerate(record.spec.sockets):
        if socket.mode == "listen":
            fd = await parts.storage.listen(live.vm.record.vm_id, socket.host_path)
        else:
            fd = await parts.storage.connect(socket.host_path)
        try:
            port = Port(
                port_id=socket.port_id(number),
                chardev_id=socket.chardev_id(number),
                name=socket.name,
                fd=fd,
                listens=socket.mode == "listen",
            )
            await live.vm.attach_port(port, timeout_s=REQUEST_LIMIT_S)
        finally:
            os.close(fd)
