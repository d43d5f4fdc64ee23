"""The host of mock drivers, kept in a file: what they have made outlives the node agent, as VMs do.

It ends with a boot of the host, as VMs do, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vcnode.drivers.agent.mock.guest import MockGuest, MockGuests
from vcnode.drivers.base import ImageFile
from vcnode.drivers.hypervisor.mock import MockMachine, MockWorld
from vcnode.drivers.storage.mock import MockWorld as StorageWorld
from vcnode.models.base import Moment
from vcnode.models.vm import Disk, GuestConfig, GuestContainer, NetworkAttachment, VmSpec

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _State(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Machine(_State):
    spec: VmSpec
    running: bool
    disks: dict[str, Disk]


class _Container(_State):
    spec: GuestContainer
    running: bool
    exit_code: int | None
    finished_at: Moment | None


class _Guest(_State):
    config: GuestConfig | None
    containers: list[_Container]


class _Host(_State):
    boot_id: str
    machines: list[_Machine]
    vm_dirs: set[str]
    shares: list[tuple[str, str, str]]
    notes: dict[str, str]
    images: dict[str, ImageFile]
    layers: dict[str, int]
    sockets: dict[str, str] = {}
    networks: dict[str, NetworkAttachment]
    guests: dict[str, _Guest]


class MockHost:
    """Worlds for all mock drivers of a node.

    Args:
        path: The file; what it holds is loaded at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = ""
        self.vms = MockWorld()
        self.guests = MockGuests()
        self.storage = StorageWorld()
        self.networks: dict[str, NetworkAttachment] = {}
        self._load()

    def save(self, operation: str = "") -> None:
        """Write everything down, if anything has changed. Not synced: it is to outlive a process only."""
        text = self._state().model_dump_json()
        if text != self._saved:
            fresh = self._path.with_name(f"{self._path.name}.new")
            fresh.write_text(text)
            fresh.rename(self._path)
            self._saved = text

    def _state(self) -> _Host:
        return _Host(
            boot_id=BOOT_ID.read_text(),
            machines=[_Machine(spec=m.spec, running=m.running, disks=m.disks) for m in self.vms.alive],
            vm_dirs=self.storage.vm_dirs,
            shares=[(vm_id, name, path) for (vm_id, name), path in self.storage.shares.items()],
            notes=self.storage.notes,
            images=self.storage.images,
            layers=self.storage.layers,
            sockets=self.storage.sockets,
            networks=self.networks,
            guests={vm_id: _of_guest(guest) for vm_id, guest in self.guests.by_vm_id.items()},
        )

    def _load(self) -> None:
        try:
            text = self._path.read_text()
            host = _Host.model_validate_json(text)
        except FileNotFoundError:
            return
        except (OSError, ValidationError) as exc:
            log.warning("%s cannot be read; the mock host is empty", self._path, exc_info=exc)
            return
        self.storage.images.update(host.images)
        self.storage.layers.update(host.layers)
        if host.boot_id != BOOT_ID.read_text():
            return
        for machine in host.machines:
            self.vms.machines[machine.spec.vm_id] = MockMachine(
                machine.spec, running=machine.running, disks=dict(machine.disks)
            )
        self.storage.vm_dirs |= host.vm_dirs
        self.storage.shares.update({(vm_id, name): path for vm_id, name, path in host.shares})
        self.storage.notes.update(host.notes)
        self.storage.sockets.update(host.sockets)
        self.networks.update(host.networks)
        for vm_id, guest in host.guests.items():
            self.guests.by_vm_id[vm_id] = _to_guest(guest.config, guest.containers)


def _of_guest(guest: MockGuest) -> _Guest:
    return _Guest(
        # Entropy is bytes, and of no use to a guest that has it already.
        config=None if guest.config is None else guest.config.model_copy(update={"entropy": b""}),
        containers=[
            _Container(
                spec=_veiled(container.spec),
                running=container.is_running,
                exit_code=container.exit_code,
                finished_at=container.finished_at,
            )
            for container in guest.containers.values()
        ],
    )


def _veiled(spec: GuestContainer) -> GuestContainer:
    """The container without its secrets: they are in the guest's memory, never in a file."""
    if not spec.secret_envs and not spec.secrets:
        return spec
    envs = tuple((name, "***" if name in spec.secret_envs else value) for name, value in spec.process.envs)
    return spec.model_copy(update={"process": spec.process.model_copy(update={"envs": envs}), "secrets": ()})


def _to_guest(config: GuestConfig | None, containers: Sequence[_Container]) -> MockGuest:
    """The guest again; a main process that was to end after some time has that time before it once more."""
    guest = MockGuest()
    guest.config = config
    for each in containers:
        guest.create(each.spec)
        container = guest.containers[each.spec.container_id]
        container.exit_code, container.finished_at = each.exit_code, each.finished_at
        if each.running:
            guest.start(each.spec.container_id)
    return guest
