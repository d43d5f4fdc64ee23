"""The composition root: the only place that names concrete drivers, and the order of start and stop.

Start: state directory locked, database, drivers, recovery, then NATS, so that no command is taken before the
truth about the pods is known. Stop is the reverse: take no new commands, let the running ones finish, publish
what happened, let go. Pods keep running.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from prometheus_client import CollectorRegistry

import vcnode
from vcnode.aio import Spawner, Tasks
from vcnode.bus.commands import DurableCommands
from vcnode.bus.connection import Connection
from vcnode.bus.events import EventPublisher
from vcnode.bus.kv import Lease, PodMirror
from vcnode.bus.service import CommandService
from vcnode.bus.sessions import SessionTraffic
from vcnode.drivers.agent.hyperstart import HyperstartAgent
from vcnode.drivers.agent.mock import MockAgent
from vcnode.drivers.agent.native import NativeAgent
from vcnode.drivers.agent.noop import NoopAgent
from vcnode.drivers.agent.sshd import SshdAgent
from vcnode.drivers.base import GuestAgent, Hypervisor, Network
from vcnode.drivers.failpoints import FailPoints
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.hypervisor.mock import MockHypervisor
from vcnode.drivers.hypervisor.qemu import Guest, QemuHypervisor
from vcnode.drivers.mock_host import MockHost
from vcnode.drivers.network.bridge import BridgeNetwork, Nft
from vcnode.drivers.network.cni import CniNetwork
from vcnode.drivers.network.cnm import CnmNetwork
from vcnode.drivers.network.mock import MockNetwork
from vcnode.drivers.network.noop import NoopNetwork
from vcnode.drivers.storage.images import Around, no_points
from vcnode.drivers.storage.local import LocalStorage
from vcnode.drivers.storage.mock import MockStorage
from vcnode.drivers.watched import Around as CallsWithin
from vcnode.drivers.watched import Hook, surrounded, watched
from vcnode.errors import FailedPreconditionError, StorageError, VcnodeError
from vcnode.handlers.dispatch import Dispatcher
from vcnode.handlers.services import NodeService, Services
from vcnode.http import HttpServer
from vcnode.metrics import Metrics
from vcnode.models.call import Call
from vcnode.models.commands import COMMANDS
from vcnode.models.events import EventKind
from vcnode.models.network import NetworkModel
from vcnode.models.node import NodeLease
from vcnode.models.pod import AgentType, ContainerState, HypervisorType, PodState
from vcnode.models.sessions import SessionKind
from vcnode.models.subjects import Subjects
from vcnode.pods import keyring
from vcnode.pods.contact import Contact
from vcnode.pods.fleet import FleetService
from vcnode.pods.images import ImageService
from vcnode.pods.journal import Journal
from vcnode.pods.marks import mark_of
from vcnode.pods.outbox import Outbox
from vcnode.pods.received import Received
from vcnode.pods.salvage import damaged_files
from vcnode.pods.service import PodService
from vcnode.pods.standing import Standing
from vcnode.pods.store import Store
from vcnode.pods.templates import EVICT_EVERY_S
from vcnode.settings import Settings
from vcnode.tracing import Tracing, open_tracing

log = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 5.0
MAX_LEASE_IMAGES = 64
"""Images that a lease names: it is sent often, to everybody who watches the fleet."""


def _now() -> datetime:
    return datetime.now(UTC)


def database_of(settings: Settings) -> Path:
    """Where the node keeps what it knows."""
    return settings.state_dir / "node.db"


@dataclass(frozen=True)
class Drivers:
    """Everything that touches the host."""

    hypervisors: Mapping[HypervisorType, Hypervisor]
    agents: Mapping[AgentType, GuestAgent]
    networks: Mapping[NetworkModel, Network]
    storage: LocalStorage | MockStorage

    def watched(self, *, before: Hook, after: Hook) -> Drivers:
        """The same with somebody who watches their calls."""

        return self._each(partial(watched, before=before, after=after))

    def surrounded(self, around: CallsWithin) -> Drivers:
        """The same with each of their calls made within *around*."""
        return self._each(partial(surrounded, around=around))

    def _each(self, wrap: Callable[..., Any]) -> Drivers:
        def watch(driver: D, owner: str) -> D:
            return cast(D, wrap(driver, owner))

        return Drivers(
            hypervisors={name: watch(driver, "hypervisor") for name, driver in self.hypervisors.items()},
            agents={name: watch(driver, "agent") for name, driver in self.agents.items()},
            networks={name: watch(driver, "network") for name, driver in self.networks.items()},
            storage=watch(self.storage, "storage"),
        )


D = TypeVar("D")


def choose_drivers(settings: Settings, tasks: Spawner, *, around: Around = no_points) -> Drivers:
    """What this node offers: all that is real, or, with the mock hypervisor, nothing that is."""
    if settings.hypervisor is HypervisorType.MOCK:
        return _mock_drivers(settings, FaultPlan.parse(settings.faults), tasks)
    guest = Guest(kernel=settings.guest_dir / "vmlinux", initrd=settings.guest_dir / "initrd")
    qemu = QemuHypervisor(
        settings.qemu, guest, state_dir=settings.state_dir, run_dir=settings.run_dir, tasks=tasks
    )
    return Drivers(
        hypervisors={HypervisorType.QEMU: qemu},
        agents={
            AgentType.NATIVE: NativeAgent(),
            AgentType.NOOP: NoopAgent(),
            AgentType.HYPERSTART: HyperstartAgent(),
            AgentType.SSHD: SshdAgent(settings.state_dir),
        },
        networks={
            NetworkModel.NOOP: NoopNetwork(),
            # Before the bridge, whose audit takes the namespace of any orphan away: plugins look into it.
            NetworkModel.CNI: CniNetwork(settings.cni, settings.state_dir),
            NetworkModel.CNM: CnmNetwork(settings.cnm, settings.state_dir),
            NetworkModel.BRIDGE: BridgeNetwork(settings.bridge, mark_of(settings), Nft.find()),
        },
        storage=LocalStorage(
            settings.state_dir,
            settings.run_dir,
            settings.host_paths,
            settings.images,
            around=around,
            secret_dirs=settings.policy.secret_dirs,
            hook_dirs=settings.policy.hook_dirs,
        ),
    )


def _mock_drivers(settings: Settings, plan: FaultPlan, tasks: Spawner) -> Drivers:
    host = MockHost(settings.state_dir / "mock-host.json")
    drivers = Drivers(
        hypervisors={HypervisorType.MOCK: MockHypervisor(plan, world=host.vms)},
        agents={
            AgentType.MOCK: MockAgent(plan, tasks=tasks, guests=host.guests),
            AgentType.NOOP: NoopAgent(),
        },
        networks={
            NetworkModel.NOOP: NoopNetwork(plan),
            **{
                model: MockNetwork(plan, made=host.networks, model=model)
                for model in (NetworkModel.BRIDGE, NetworkModel.CNI, NetworkModel.CNM)
            },
        },
        storage=MockStorage(
            settings.host_paths,
            run_dir=settings.run_dir,
            secret_dirs=settings.policy.secret_dirs,
            hook_dirs=settings.policy.hook_dirs,
            faults=plan,
            world=host.storage,
        ),
    )
    return drivers.watched(before=host.save, after=host.save)


@contextlib.contextmanager
def state_lock(state_dir: Path) -> Iterator[None]:
    """Hold the state directory, made if it is missing: two node agents would both run its pods.

    Raises:
        FailedPreconditionError: Another node agent holds it.
        StorageError: It cannot be used.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as exc:
        raise StorageError(f"State directory {state_dir} cannot be used: {exc.strerror}.") from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise FailedPreconditionError(
                f"Another node agent uses {state_dir}; stop it, or give this one a state_dir of its own."
            ) from exc
        yield
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Node:
    """A node agent that takes commands, with the parts that tests and tools look at."""

    settings: Settings
    drivers: Drivers
    pods: PodService
    images: ImageService
    service: NodeService
    connection: Connection
    http_address: str | None
    """Where metrics are served, ``host:port``; None when turned off."""


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Node]:
    """A node agent from start to stop; see the module for the order.

    Raises:
        VcnodeError: It cannot start; what to do is said, and nothing is left but the state directory.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(state_lock(settings.state_dir))
        registry = CollectorRegistry()
        tracing = open_tracing(
            settings.node_name,
            vcnode.__version__,
            endpoint=settings.tracing.endpoint,
            sample_ratio=settings.tracing.sample_ratio,
        )
        stack.push_async_callback(tracing.close)
        traced = bool(settings.tracing.endpoint)
        metrics = Metrics(registry, COMMANDS, on_phase=tracing.phase if traced else None)
        store = await Store.open(database_of(settings), node_name=settings.node_name, clock=_now)
        stack.push_async_callback(store.close)
        tasks = await stack.enter_async_context(Tasks())
        points = FailPoints(FaultPlan.parse(settings.faults).rules)
        drivers = choose_drivers(settings, tasks, around=points.around)
        if points:
            drivers = drivers.watched(before=points.before, after=points.after)
            points.guard(store)
        if traced:
            drivers = drivers.surrounded(tracing.call)
        await _open_drivers(drivers, stack)
        mock = settings.hypervisor is HypervisorType.MOCK
        images = ImageService(
            store,
            drivers.storage,
            tasks=tasks,
            settings=settings.images,
            clock=_now,
            mock=mock,
            policy=settings.policy,
        )
        standing = await Standing.open(store, labels=settings.labels, taints=settings.taints, mock=mock)
        contact = Contact.open(settings.state_dir / "contact.json")
        pods = PodService(
            node_name=settings.node_name,
            epoch=store.epoch,
            store=store,
            hypervisors=drivers.hypervisors,
            agents=drivers.agents,
            networks=drivers.networks,
            storage=drivers.storage,
            images=images,
            settings=settings,
            tasks=tasks,
            metrics=metrics,
            clock=_now,
            takes_pods=standing.check_takes_pods,
            keys=keyring.load(settings.state_dir, settings.secrets.key_files),
            contact=contact,
        )
        stack.push_async_callback(pods.close)
        journal = Journal(
            store,
            max_entries=settings.limits.journal_entries,
            max_age_s=settings.limits.journal_age_s,
            max_unpublished=settings.limits.outbox_events,
            mock=mock,
        )
        await _tell_rebuilt(store, pods)
        tasks.spawn(_after_rebuilds(store, pods, standing), name="rebuilds of the database")
        await pods.recover()
        await journal.fail_unfinished()
        fleet = FleetService(pods=pods, standing=standing, clock=_now)
        service = NodeService(
            epoch=store.epoch,
            settings=settings,
            hypervisors=drivers.hypervisors,
            agents=drivers.agents,
            networks=drivers.networks,
            pods=pods,
            fleet=fleet,
            clock=_now,
        )
        outbox = Outbox(store, retention_s=settings.limits.outbox_retention_s)
        _describe(metrics, service, pods, outbox, settings)
        services = Services(
            pods=pods,
            images=images,
            node=service,
            fleet=fleet,
            streams=pods.streams,
            sessions=pods.sessions,
        )
        bus = _join_bus(
            settings,
            metrics,
            store,
            journal,
            outbox,
            services,
            lambda: _lease(settings, pods, service, store.identity),
            contact,
            tasks,
            stack,
            tracing,
        )
        fleet.on_change(bus.lease.look)
        connection = bus.connection
        pods.sessions.use(
            SessionTraffic(
                connection,
                pods.sessions,
                node_name=settings.node_name,
                subjects=Subjects(settings.nats.prefix),
            )
        )
        address = await _serve_http(settings, registry, connection, service, pods, stack)
        await pods.announce(EventKind.NODE_STARTED, service.info().model_dump(mode="json"))
        connection.start()
        pods.templates.warm()
        tasks.spawn(pods.templates.evict_forever(EVICT_EVERY_S), name="old templates")
        pods.pool.start()
        # Before restarts, and before there can be any contact: what is due by now has to end for good.
        pods.disconnects.start()
        pods.start_restarts()
        if settings.audit_interval_s:
            tasks.spawn(pods.audit_forever(settings.audit_interval_s), name="audit")
        yield Node(settings, drivers, pods, images, service, connection, address)
        if settings.on_terminate == "stop":
            await _drain_pods(fleet, settings.terminate_timeout_s)
        log.info("Stopping: running commands have %g s to finish", settings.drain_timeout_s)
        service.drain()
        await pods.sessions.stop()
        await pods.wind_down()
        await pods.announce(EventKind.NODE_STOPPING, service.info().model_dump(mode="json"))
        await bus.drain(timeout_s=settings.drain_timeout_s)


async def _tell_rebuilt(store: Store, pods: PodService) -> None:
    if (rebuilt := store.rebuilt) is not None:
        facts: dict[str, object] = {
            "reason": rebuilt.reason,
            "kept_aside": rebuilt.kept_aside,
            "carried_over": dict(rebuilt.carried),
        }
        await pods.announce(EventKind.NODE_DATABASE_REBUILT, facts)


async def _after_rebuilds(store: Store, pods: PodService, standing: Standing) -> None:
    """Tell of each time that the database was found damaged while the node ran, and keep what it lost."""
    while True:
        await store.mended.wait()
        store.mended.clear()
        try:
            await standing.keep()
            await _tell_rebuilt(store, pods)
        except VcnodeError as exc:
            log.warning("The rebuild of the database cannot be told", exc_info=exc)


async def _open_drivers(drivers: Drivers, stack: contextlib.AsyncExitStack) -> None:
    await drivers.storage.open()
    for hypervisor in drivers.hypervisors.values():
        stack.push_async_callback(hypervisor.close)
        await hypervisor.open()
        for note in hypervisor.info.notes:
            log.warning("%s", note, extra={"driver": hypervisor.info.type})
    for network in drivers.networks.values():
        stack.push_async_callback(network.close)
        await network.open()
        for note in network.info.notes:
            log.warning("%s", note, extra={"driver": network.info.type})


@dataclass(frozen=True)
class _Bus:
    """Everything that speaks NATS."""

    connection: Connection
    commands: CommandService
    durable: DurableCommands
    lease: Lease

    async def drain(self, *, timeout_s: float) -> None:
        """Take no more commands; let those that run finish, at most *timeout_s* seconds in all."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self.durable.stop_intake()
        await self.commands.drain(timeout_s=timeout_s)
        await self.durable.drain(timeout_s=max(0.0, deadline - loop.time()))


def _join_bus(
    settings: Settings,
    metrics: Metrics,
    store: Store,
    journal: Journal,
    outbox: Outbox,
    services: Services,
    describe_lease: Callable[[], NodeLease],
    contact: Contact,
    tasks: Tasks,
    stack: contextlib.AsyncExitStack,
    tracing: Tracing,
) -> _Bus:
    """Set up everything that speaks NATS; ``connection.start()`` then lets commands in."""
    subjects = Subjects(settings.nats.prefix)
    connection = Connection(settings.nats, name=f"vcnode-{settings.node_name}", tasks=tasks, observer=metrics)
    stack.push_async_callback(connection.close)
    # First of all that is set up on a client: nothing is subscribed while another node has this name.
    lease = Lease(
        connection,
        describe_lease,
        contact,
        subjects=subjects,
        settings=settings.nats,
    )
    renewing = tasks.spawn(lease.run(), name="lease")

    async def release() -> None:
        renewing.cancel()  # or it could take what was just given back
        await asyncio.wait({renewing})
        await lease.release()

    stack.push_async_callback(release)
    mirror = PodMirror(
        connection,
        lambda: {p.pod_id: p.encoded for p in services.pods.list({}, ()).pods},
        store.changed,
        node_name=settings.node_name,
        subjects=subjects,
        settings=settings.nats,
    )
    mirroring = tasks.spawn(mirror.run(), name="pod-mirror")
    dispatcher = Dispatcher(
        services,
        journal,
        max_concurrent=settings.limits.concurrent_commands,
        max_waits=settings.limits.concurrent_waits,
        max_request_bytes=settings.limits.request_bytes,
        observer=metrics,
        clock=_now,
        tasks=tasks,
        audits=settings.audit_events,
        trusts_request_info=settings.nats.trust_request_info,
        tracing=tracing,
    )
    publisher = EventPublisher(
        connection,
        outbox,
        node_name=settings.node_name,
        subjects=subjects,
        settings=settings.nats,
        observer=metrics,
    )
    publishing = tasks.spawn(publisher.run(), name="event-publisher")

    async def flush() -> None:
        publishing.cancel()
        mirroring.cancel()
        await asyncio.wait({publishing, mirroring})
        if connection.connected:
            await publisher.flush(timeout_s=FLUSH_TIMEOUT_S)
            await mirror.flush(timeout_s=FLUSH_TIMEOUT_S)

    stack.push_async_callback(flush)
    commands = CommandService(connection, dispatcher, node_name=settings.node_name, subjects=subjects)
    stack.push_async_callback(commands.close)
    durable = DurableCommands(
        connection,
        dispatcher,
        Received(
            store,
            max_entries=settings.limits.journal_entries,
            max_age_s=max(settings.limits.journal_age_s, settings.nats.command_max_age_s),
            mock=services.node.mock,
        ),
        node_name=settings.node_name,
        subjects=subjects,
        settings=settings.nats,
    )
    stack.push_async_callback(durable.close)
    tasks.spawn(durable.run(), name="durable-commands")
    return _Bus(connection, commands, durable, lease)


async def _drain_pods(fleet: FleetService, timeout_s: float) -> None:
    """Stop all pods before the node agent ends; it comes back cordoned no more than it was before."""
    was_ready = fleet.standing().state == "ready"
    log.info("Stopping all pods: they have %g s", timeout_s)
    call = Call(command_id=f"terminate-{secrets.token_hex(8)}", verb="node.drain")
    try:
        await fleet.drain(timeout_s=timeout_s, delete=False, reason="the node agent stops", call=call)
        if was_ready:
            await fleet.uncordon()
    except VcnodeError as exc:
        log.warning("The pods could not be drained", exc_info=exc)


def _lease(settings: Settings, pods: PodService, service: NodeService, identity: str) -> NodeLease:
    """What the node's lease says now."""
    info = service.info()
    capacity = pods.host_capacity()
    active = [record for record in pods.records if record.state not in (PodState.READY, PodState.STOPPED)]
    hypervisor = next((d for d in info.hypervisors if d.type == settings.hypervisor), None)
    shapes = {f"{shape.vcpu_count}x{shape.mem_size_mib}" for shape in pods.templates.shapes}
    return NodeLease(
        node=info.node,
        identity=identity,
        epoch=info.epoch,
        version=info.version,
        state=info.state,
        labels=info.labels,
        taints=info.taints,
        mock=info.mock,
        accelerator=info.accelerator,
        hypervisor_version=hypervisor.version if hypervisor else None,
        host=socket.gethostname(),
        pid=os.getpid(),
        lease_s=settings.nats.lease_s,
        renewed_at=_now(),
        capacity=capacity,
        allocatable=pods.capacity.total,
        reserved=pods.capacity.reserved(pods.records),
        used=pods.capacity.taken(active),
        templates=tuple(sorted(shapes)),
        images=tuple(sorted(pods.image_names)[:MAX_LEASE_IMAGES]),
        queued_starts=pods.queued_starts,
        xkeys=pods.public_keys,
    )


def _describe(
    metrics: Metrics, service: NodeService, pods: PodService, outbox: Outbox, settings: Settings
) -> None:
    info = service.info()
    metrics.watch_pool(
        ready=lambda: sum(shape.ready for shape in pods.pool.statuses()), queued=lambda: pods.queued_starts
    )
    metrics.runs(version=vcnode.__version__, accelerator=info.accelerator, mock=info.mock)
    metrics.watch(
        pods=lambda: _counts(PodState, (p.state for p in pods.list({}, ()).pods)),
        containers=lambda: _counts(
            ContainerState, (c.state for c in pods.list_containers(None, ()).containers)
        ),
        unpublished=lambda: outbox.unpublished_count,
    )
    metrics.watch_pods(pods.samples.latest, overhead_bytes=pods.capacity.overhead_mib << 20)
    metrics.watch_streams(
        sessions=lambda: {kind: pods.sessions.counts.get(kind, 0) for kind in get_args(SessionKind)},
        limit=settings.limits.sessions,
        received=lambda: pods.sessions.received_bytes,
        sent=lambda: pods.sessions.sent_bytes,
        lost_output=lambda: pods.logs.lost_bytes,
    )
    metrics.watch_database(lambda: len(damaged_files(database_of(settings))))


S = TypeVar("S", PodState, ContainerState)


def _counts(states: type[S], present: Iterable[S]) -> dict[str, int]:
    """How often each of *states* is present, zeros included."""
    counted = Counter(present)
    return {state.value: counted[state] for state in states}


async def _serve_http(
    settings: Settings,
    registry: CollectorRegistry,
    connection: Connection,
    service: NodeService,
    pods: PodService,
    stack: contextlib.AsyncExitStack,
) -> str | None:
    if not settings.metrics_address:
        return None

    def ready() -> tuple[bool, str]:
        if service.draining:
            return False, "The node is draining."
        if not connection.connected:
            return False, f"No connection to NATS at {connection.url}."
        return True, "ready"

    server = HttpServer(registry, ready, prepare=pods.samples.refresh)
    stack.push_async_callback(server.close)
    host, port = await server.start(settings.metrics_address)
    return f"{host}:{port}"


async def run(settings: Settings, *, on_ready: Callable[[Node], None] | None = None) -> None:
    """Run a node agent until SIGTERM or SIGINT, then drain it. Pods keep running.

    Args:
        settings: Its settings.
        on_ready: Called once commands are taken (as soon as NATS is connected).

    Raises:
        VcnodeError: It cannot start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with running(settings) as node:
            info = node.service.info()
            log.info(
                "Node %s is up",
                info.node,
                extra={"accelerator": info.accelerator, "mock": info.mock, "metrics": node.http_address},
            )
            if on_ready is not None:
                on_ready(node)
            await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
