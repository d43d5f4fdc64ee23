"""What the acts on pods work with: drivers, ledger, locks and notes, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeVar

from vcnode.aio import Spawner
from vcnode.drivers.base import GuestAgent, Hypervisor, Network, Storage
from vcnode.errors import UnsupportedError
from vcnode.models.network import NetworkModel
from vcnode.models.pod import AgentType, HypervisorType
from vcnode.models.records import PodRecord
from vcnode.pods.backoff import Backoff
from vcnode.pods.contact import Contact
from vcnode.pods.forecast import Forecast
from vcnode.pods.host import HostMemory
from vcnode.pods.images import ImageService
from vcnode.pods.ledger import Ledger
from vcnode.pods.live import LivePod
from vcnode.pods.locks import PodLocks
from vcnode.pods.logs import LogPump
from vcnode.pods.queue import StartQueue
from vcnode.pods.secrets import Secrets
from vcnode.settings import Settings

REQUEST_LIMIT_S = 30.0
"""Seconds that one request to a guest, network or disk may take."""
KILL_LIMIT_S = 20.0
"""Seconds for a VM to be killed, and for a container to end after SIGKILL."""


class Observer(Protocol):
    """Whoever measures; the metrics of the node."""

    def phase(self, name: str, seconds: float, traceparent: str | None) -> None:
        """A phase of a start took so long; *traceparent* is that of its command."""
        ...

    def session_lost(self) -> None:
        """A session with a guest was lost."""
        ...

    def template_made(self) -> None:
        """A VM template was booted and saved."""
        ...

    def template_broken(self) -> None:
        """A VM template could not be used and was dropped."""
        ...

    def spare_taken(self, found: bool) -> None:
        """A pod of a shape that has a pool came: there was a spare for it, or not."""
        ...

    def spare_lost(self) -> None:
        """A spare died while it waited, or did not answer when it was taken."""
        ...

    def restarted(self, what: str) -> None:
        """A restart policy has started a ``container`` or a ``pod`` again."""
        ...

    def audited(self, *, held: Mapping[str, int], orphans: Mapping[str, int], freed: int) -> None:
        """The host was looked at: what is held and what of it is nobody's, by kind; how much was removed."""
        ...


@dataclass(frozen=True)
class Parts:
    """Everything that start, stop, containers, exec, watch and recovery share."""

    ledger: Ledger
    locks: PodLocks
    hypervisors: Mapping[HypervisorType, Hypervisor]
    agents: Mapping[AgentType, GuestAgent]
    networks: Mapping[NetworkModel, Network]
    storage: Storage
    images: ImageService
    settings: Settings
    tasks: Spawner
    observer: Observer
    clock: Callable[[], datetime]
    memory: Callable[[], HostMemory]
    logs: LogPump
    secrets: Secrets
    """Opens what only guests are to see."""
    starts: StartQueue
    """Bounds the pods that start at once."""
    contact: Contact
    """When the fleet last heard of this node."""
    forecast: Forecast = field(default_factory=Forecast)
    """Learns how long starts take."""
    live: dict[str, LivePod] = field(default_factory=dict)
    """Running VMs by pod id."""

    @property
    def backoff(self) -> Backoff:
        """How long restart policies wait."""
        restarts = self.settings.restarts
        return Backoff(restarts.backoff_s, restarts.backoff_max_s, restarts.reset_after_s)

    def hypervisor(self, record: PodRecord) -> Hypervisor:
        """The driver of the pod's VM. Raises UnsupportedError when the node no longer has it."""
        return driver(self.hypervisors, record.hypervisor_type, "hypervisor_type")

    def agent(self, record: PodRecord) -> GuestAgent:
        """The driver that reaches into the pod's guest. Raises as `hypervisor`."""
        return driver(self.agents, record.agent_type, "agent_type")

    def network(self, record: PodRecord) -> Network:
        """The driver of the pod's network. Raises as `hypervisor`."""
        return driver(self.networks, record.network_model, "network_model")


K = TypeVar("K", HypervisorType, AgentType, NetworkModel)
D = TypeVar("D")


def driver(offered: Mapping[K, D], wanted: K, field_name: str) -> D:
    """The driver of that type.

    Raises:
        UnsupportedError: This node does not offer it; names those that it does.
    """
    found = offered.get(wanted)
    if found is None:
        names = sorted(t.value for t in offered)
        raise UnsupportedError(
            f"{field_name}: this node does not offer {wanted.value}; it has {', '.join(names) or 'none'}.",
            field=field_name,
            offered=names,
        )
    return found
