"""A small host for the pod service: mock drivers on worlds that outlive it, as VMs outlive a node."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from vcnode.aio import Tasks
from vcnode.drivers.agent.mock import MockAgent
from vcnode.drivers.agent.mock.guest import MockGuests
from vcnode.drivers.agent.noop import NoopAgent
from vcnode.drivers.base import Network
from vcnode.drivers.faults import FaultPlan, Rule
from vcnode.drivers.hypervisor.mock import MockHypervisor, MockWorld
from vcnode.drivers.network.mock import MockNetwork
from vcnode.drivers.network.noop import NoopNetwork
from vcnode.drivers.storage.mock import MockStorage
from vcnode.drivers.storage.mock import MockWorld as StorageWorld
from vcnode.errors import StorageError
from vcnode.models.call import Call
from vcnode.models.events import Event
from vcnode.models.network import NetworkModel
from vcnode.models.pod import (
    AgentType,
    Cmd,
    ContainerSpec,
    HypervisorType,
    PodSpec,
    RestartPolicy,
)
from vcnode.models.vm import NetworkAttachment
from vcnode.models.xkeys import CurveKey
from vcnode.pods.contact import Contact
from vcnode.pods.host import HostMemory
from vcnode.pods.images import ImageService
from vcnode.pods.journal import Journal
from vcnode.pods.outbox import Outbox
from vcnode.pods.service import PodService
from vcnode.pods.store import Store, Tx
from vcnode.settings import LimitSettings, Settings

T = TypeVar("T")

ROOT = "/roots/busybox"
"""A directory that the mock storage takes for one."""
SLEEP = Cmd(args=("sleep", "infinity"))


class Clock:
    """Time that goes one second a look."""

    def __init__(self) -> None:
        self._seconds = itertools.count()

    def __call__(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(self._seconds))


class Killed(BaseException):
    """The node agent was killed here: whatever would have come after does not happen."""


class Naps:
    """Sleeps that end when the test says so."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        """Seconds of each, from the first on."""
        self._asleep: list[asyncio.Event] = []

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        woken = asyncio.Event()
        self._asleep.append(woken)
        try:
            await woken.wait()
        finally:
            if woken in self._asleep:
                self._asleep.remove(woken)

    @property
    def count(self) -> int:
        """How many are asleep."""
        return len(self._asleep)

    def wake(self) -> None:
        """Let the time pass that they wait for."""
        while self._asleep:
            self._asleep.pop().set()


class RecordingPlan(FaultPlan):
    """A plan that keeps the order of driver calls and commits, and lets a test act at chosen ones."""

    def __init__(self, *rules: Rule) -> None:
        super().__init__(*rules)
        self.log: list[str] = []
        """Driver operations, and ``commit`` and ``committed`` around each write of the store."""
        self.at: dict[int, Callable[[], None]] = {}
        """By position in `log`: called when that is reached; may raise."""
        self.dead = False
        self.died = asyncio.Event()
        self.failing: tuple[str, ...] = ()
        """What fails at every call, for as long as it stands here."""

    def reach(self, what: str) -> None:
        """Note *what* and do what the test wants there."""
        if self.dead:
            raise Killed
        self.log.append(what)
        if (act := self.at.get(len(self.log) - 1)) is not None:
            act()
        if what in self.failing:
            raise StorageError(f"{what} fails for now.")

    def die(self) -> None:
        """Play SIGKILL: from here on no driver does anything and nothing is committed."""
        self.dead = True
        self.died.set()
        raise Killed

    async def hit(self, operation: str, *, vm_id: str | None = None) -> None:
        self.reach(operation)
        await super().hit(operation, vm_id=vm_id)


class RecordedStore(Store):
    """A store whose commits a plan knows of."""

    plan: RecordingPlan

    async def write(self, work: Callable[[Tx], T]) -> T:
        self.plan.reach("commit")
        result = await super().write(work)
        self.plan.reach("committed")
        return result


class Observed:
    """What the service measured."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []
        self.sessions_lost = 0
        self.restarts: list[str] = []
        self.templates_made = 0
        self.templates_broken = 0
        self.spares_taken: list[bool] = []
        self.spares_lost = 0
        self.audits: list[tuple[dict[str, int], dict[str, int], int]] = []

    def restarted(self, what: str) -> None:
        self.restarts.append(what)

    def phase(self, name: str, seconds: float, traceparent: str | None) -> None:
        self.phases.append((name, seconds))

    def session_lost(self) -> None:
        self.sessions_lost += 1

    def template_made(self) -> None:
        self.templates_made += 1

    def template_broken(self) -> None:
        self.templates_broken += 1

    def spare_taken(self, found: bool) -> None:
        self.spares_taken.append(found)

    def spare_lost(self) -> None:
        self.spares_lost += 1

    def audited(self, *, held: Mapping[str, int], orphans: Mapping[str, int], freed: int) -> None:
        self.audits.append((dict(held), dict(orphans), freed))


class World:
    """A host with one node on it, which can be restarted.

    Args:
        path: Directory of the database.
        faults: Plan of the first node's drivers; a restart gets an empty one unless told otherwise.
        templates: Whether the hypervisor has templates; the network is then one without taps.
        networks: The node's networks, made with each start; those of mocks if None.
        settings: Changes to the node's settings.
    """

    def __init__(
        self,
        path: Path,
        faults: str = "",
        *,
        templates: bool = False,
        networks: Callable[[Settings], Mapping[NetworkModel, Network]] | None = None,
        **settings: object,
    ) -> None:
        self._templates = templates
        self._networks = networks
        self.path = path
        self.settings = Settings(
            node_name="n1",
            state_dir=path,
            run_dir=Path("/run/vc"),
            allowed_roots=(Path("/roots"),),
            hypervisor=HypervisorType.MOCK,
            network=NetworkModel.NOOP if templates else NetworkModel.BRIDGE,
            **settings,  # type: ignore[arg-type]
        )
        self.clock: Callable[[], datetime] = Clock()
        self.boot_s = 1000.0
        """Seconds since the host has booted; stands still but for the test."""
        self.naps = Naps()
        self.policy = RestartPolicy.NEVER
        self.vms = MockWorld()
        self.guests = MockGuests()
        self.host = StorageWorld()
        self.taps: dict[str, NetworkAttachment] = {}
        self.memory = HostMemory(total_mib=8192, available_mib=4096)
        self._command_ids = itertools.count(1)
        self._faults = faults
        self.keys: tuple[CurveKey, ...] = ()
        """Open sealed secrets."""

    async def start(self, faults: str | None = None) -> World:
        """Open the node on what is there; its pods are not recovered yet."""
        rules = FaultPlan.parse(self._faults if faults is None else faults).rules
        self.plan = plan = RecordingPlan(*rules)
        self.tasks = Tasks()
        self.observed = Observed()
        store = await RecordedStore.open(self.path / "node.db", node_name="n1", clock=self.clock)
        assert isinstance(store, RecordedStore)
        store.plan = plan
        self.store = store
        self.outbox = Outbox(self.store, retention_s=3600)
        limits = self.settings.limits
        self.journal = Journal(
            self.store,
            max_entries=limits.journal_entries,
            max_age_s=limits.journal_age_s,
            max_unpublished=limits.outbox_events,
        )
        self.storage = MockStorage(
            (Path("/roots"),),
            run_dir=Path("/run/vc"),
            secret_dirs=self.settings.policy.secret_dirs,
            hook_dirs=(Path("/hooks"),),
            faults=plan,
            world=self.host,
        )
        self.images = ImageService(
            self.store,
            self.storage,
            tasks=self.tasks,
            settings=self.settings.images,
            clock=self.clock,
            mock=True,
            policy=self.settings.policy,
        )
        self.contact = Contact.open(self.path / "contact.json", clock=lambda: self.boot_s)
        self.hypervisor = MockHypervisor(plan, world=self.vms, templates=self._templates)
        self.agent = MockAgent(plan, tasks=self.tasks, guests=self.guests)
        self.network = MockNetwork(plan, made=self.taps)
        self.networks: Mapping[NetworkModel, Network] = {
            NetworkModel.BRIDGE: self.network,
            NetworkModel.NOOP: NoopNetwork(plan),
        }
        if self._networks is not None:
            self.networks = self._networks(self.settings)
        self.pods = PodService(
            node_name="n1",
            epoch=self.store.epoch,
            store=self.store,
            hypervisors={HypervisorType.MOCK: self.hypervisor},
            agents={AgentType.MOCK: self.agent, AgentType.NOOP: NoopAgent()},
            networks=self.networks,
            storage=self.storage,
            images=self.images,
            settings=self.settings,
            tasks=self.tasks,
            metrics=self.observed,
            clock=self.clock,
            sleep=self.naps,
            memory=lambda: self.memory,
            keys=self.keys,
            contact=self.contact,
        )
        return self

    async def close(self) -> None:
        """End the node in good order; the host stays as it is."""
        await self.pods.close()
        await self.tasks.close()
        await self.store.close()

    async def crash(self) -> None:
        """End the node as SIGKILL would: no undo, no farewell; only what was committed remains."""
        self.plan.dead = True
        await self.tasks.close()
        await self.store.close()

    async def reboot(self) -> None:
        """End the node and all that lives on the host; only what is on its disks remains."""
        await self.crash()
        self.vms, self.guests = MockWorld(), MockGuests()
        self.host = StorageWorld(images=self.host.images, layers=self.host.layers)
        self.taps.clear()

    async def restart(self, faults: str = "") -> World:
        """Close and start again."""
        await self.close()
        return await self.start(faults)

    def call(self, verb: str = "test", *, revision: int | None = None) -> Call:
        """A command of its own."""
        return Call(f"cmd-{next(self._command_ids)}", verb, expected_revision=revision)

    async def events(self) -> list[Event]:
        """Every event so far."""
        return list(await self.outbox.since(0, 100_000))

    async def kinds(self, subject: str | None = None) -> list[str]:
        """Kinds of the events so far, of one subject or of all."""
        return [e.kind for e in await self.events() if subject is None or e.subject == subject]

    async def until_event(self, kind: str, count: int = 1) -> Event:
        """Wait for the *count*-th event of a kind."""
        while True:
            found = [e for e in await self.events() if e.kind == kind]
            if len(found) >= count:
                return found[count - 1]
            await asyncio.sleep(0.005)  # the store has no hook for tests; bounded by the test's own limit

    @property
    def leaks(self) -> list[str]:
        """Whatever is held on the host: VMs, directories, shares, taps."""
        return [
            *(f"vm {m.spec.vm_id}" for m in self.vms.alive),
            *(f"directory {name}" for name in sorted(self.host.vm_dirs)),
            *(f"share {key}" for key in sorted(self.host.shares)),
            *(f"tap of {name}" for name in sorted(self.taps)),
        ]


def pod(pod_id: str = "p1", containers: Iterable[ContainerSpec] | None = None, **fields: object) -> PodSpec:
    """A pod with one container that sleeps, unless told otherwise."""
    if containers is None:
        containers = (container(),)
    return PodSpec(id=pod_id, containers=tuple(containers), **fields)  # type: ignore[arg-type]


def container(container_id: str = "c1", *args: str, **fields: object) -> ContainerSpec:
    """A container on a host directory that sleeps, or runs *args*."""
    fields.setdefault("cmd", Cmd(args=args) if args else SLEEP)
    if "image" not in fields:
        fields.setdefault("rootfs", ROOT)
    return ContainerSpec(id=container_id, **fields)  # type: ignore[arg-type]


SMALL = LimitSettings(pods=3, concurrent_starts=1)
