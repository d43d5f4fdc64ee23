"""Opens sessions with mock guests, with a fault plan in front of each call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

import vcnode
from vcnode.aio import Spawner, deadline_as
from vcnode.drivers.agent.events import EventQueue
from vcnode.drivers.agent.mock.guest import MockGuest, MockGuests
from vcnode.drivers.agent.mock.logs import MockLogFeed
from vcnode.drivers.agent.mock.process import ECHO_PORT, MockConnection, MockProcess, check_signal
from vcnode.drivers.agent.mock.stats import stats_of
from vcnode.drivers.base import (
    PLAIN_ACCESS,
    AgentAccess,
    ContainerExited,
    ContainerHealth,
    CopyDirection,
    GuestConnection,
    GuestEvent,
    GuestSession,
    LogPosition,
    RunningProcess,
    SessionLost,
    Vm,
)
from vcnode.drivers.faults import FaultPlan
from vcnode.errors import AgentError, DeadlineExceededError, FailedPreconditionError
from vcnode.models.living import ContainerProcess
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, AgentType, ContainerResources
from vcnode.models.stats import ContainerStats, GuestStats
from vcnode.models.vm import (
    AGENT_CHANNELS,
    SHARE_TAG,
    Channel,
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestInfo,
    GuestProcess,
    Watchdog,
)


class MockAgent:
    """The `GuestAgent` of nodes that only pretend.

    Args:
        plan: Faults, by operations such as ``agent.execute``; an empty plan if None.
        tasks: Owner of the one task for each session, which waits for the end of the VM.
        guests: Where the guests live; new ones if None. Two agents on the same are one node, restarted.
    """

    def __init__(
        self, plan: FaultPlan | None = None, *, tasks: Spawner, guests: MockGuests | None = None
    ) -> None:
        self.guests = MockGuests() if guests is None else guests
        self._plan = FaultPlan() if plan is None else plan
        self._tasks = tasks
        self._sessions: dict[str, MockSession] = {}

    @property
    def info(self) -> DriverInfo:
        """See `GuestAgent.info`: those of the native agent, and marked as a mock."""
        return DriverInfo(
            type=AgentType.MOCK,
            version=vcnode.__version__,
            capabilities=(
                *(
                    "attach",
                    "configure",
                    "containers",
                    "copy",
                    "exec",
                    "forward",
                    "images",
                    "limits",
                    "mounts",
                ),
                *("privileges", "probes", "readonly", "secrets", "stats", "tty", "watchdog"),
            ),
            mock=True,
        )

    @property
    def share_tag(self) -> str:
        """See `GuestAgent.share_tag`."""
        return SHARE_TAG

    def channels(self, config: AgentConfig) -> tuple[Channel, ...]:
        """See `GuestAgent.channels`."""
        return AGENT_CHANNELS

    async def connect(self, vm: Vm, *, access: AgentAccess = PLAIN_ACCESS, timeout_s: float) -> GuestSession:
        """See `GuestAgent.connect`. A session that the guest has already is lost."""
        vm_id = vm.record.vm_id
        async with deadline_as(
            timeout_s,
            lambda: AgentError(f"The guest agent of {vm_id} did not answer within {timeout_s:g} s."),
        ):
            await self._plan.hit("agent.connect", vm_id=vm_id)
            await _hears(vm)
        if (earlier := self._sessions.pop(vm_id, None)) is not None:
            earlier.lose("Another session was opened.")
        guest = self.guests.by_vm_id.setdefault(vm_id, MockGuest())
        guest.is_paused = lambda: vm.paused
        session = MockSession(vm, guest, self._plan)
        watcher = self._tasks.spawn(self._watch(vm, session), name=f"mock agent session of {vm_id}")
        session.watcher = watcher
        self._sessions[vm_id] = session
        await asyncio.sleep(0)  # lets the watcher look: a VM that is gone already is noticed here
        session.check()
        return session

    async def _watch(self, vm: Vm, session: MockSession) -> None:
        """When the VM ends, so does its guest, and with it the session."""
        await vm.wait()
        vm_id = vm.record.vm_id
        if (guest := self.guests.by_vm_id.pop(vm_id, None)) is not None:
            guest.power_off()
        self._sessions.pop(vm_id, None)
        session.lose("The VM has ended.")


class MockSession:
    """A `GuestSession` with a `MockGuest`."""

    def __init__(self, vm: Vm, guest: MockGuest, plan: FaultPlan) -> None:
        self._vm = vm
        self._vm_id = vm.record.vm_id
        self._guest = guest
        self._plan = plan
        self._over: str | None = None
        self._processes: set[MockProcess] = set()
        self._events = EventQueue()
        self._feed: MockLogFeed | None = None
        self.watcher: asyncio.Task[None] | None = None
        """Ends the session with the VM; cancelled when the session ends otherwise."""
        guest.on_exit = guest.on_health = self._on_event

    @property
    def info(self) -> GuestInfo:
        """See `GuestSession.info`."""
        return GuestInfo(agent_version=vcnode.__version__, boot_id=f"mock-{self._vm_id}", kernel="mock")

    async def configure(self, config: GuestConfig, *, timeout_s: float) -> None:
        """See `GuestSession.configure`."""
        async with self._operation("configure", timeout_s):
            self._guest.config = config
            self._guest.watchdog = config.watchdog

    async def set_clock(self, time_ns: int, *, timeout_s: float) -> None:
        """See `GuestSession.set_clock`. Nobody looks at the clock of a mock guest."""
        async with self._operation("set_clock", timeout_s):
            self._guest.catch_up()

    async def set_watchdog(self, watchdog: Watchdog, *, timeout_s: float) -> None:
        """See `GuestSession.set_watchdog`. The mock guest remembers it, and does not end."""
        async with self._operation("set_watchdog", timeout_s):
            self._guest.watchdog = watchdog

    async def create_container(self, container: GuestContainer, *, timeout_s: float) -> None:
        """See `GuestSession.create_container`. No file is looked at."""
        async with self._operation("create_container", timeout_s):
            self._guest.create(container)

    async def start_container(self, container_id: str, *, timeout_s: float) -> int:
        """See `GuestSession.start_container`."""
        async with self._operation("start_container", timeout_s):
            return self._guest.start(container_id)

    async def signal_container(
        self, container_id: str, number: int, *, everyone: bool, timeout_s: float
    ) -> None:
        """See `GuestSession.signal_container`."""
        async with self._operation("signal_container", timeout_s):
            check_signal(number)
            self._guest.signal(container_id, number, everyone=everyone)

    async def pause_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.pause_container`."""
        async with self._operation("pause_container", timeout_s):
            self._guest.pause(container_id)

    async def resume_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.resume_container`."""
        async with self._operation("resume_container", timeout_s):
            self._guest.resume(container_id)

    async def update_container(
        self, container_id: str, resources: ContainerResources, *, timeout_s: float
    ) -> None:
        """See `GuestSession.update_container`."""
        async with self._operation("update_container", timeout_s):
            self._guest.update(container_id, resources)

    async def available_memory(self, *, timeout_s: float) -> int:
        """See `GuestSession.available_memory`: what the world says."""
        async with self._operation("available_memory", timeout_s):
            return self._guest.available_bytes

    async def list_processes(
        self, container_id: str, *, limit: int, timeout_s: float
    ) -> tuple[Sequence[ContainerProcess], int]:
        """See `GuestSession.list_processes`. Of the main process only."""
        async with self._operation("list_processes", timeout_s):
            found = self._guest.processes(container_id)
            return found[:limit], len(found)

    async def read_stats(self, *, timeout_s: float) -> tuple[GuestStats, Sequence[ContainerStats]]:
        """See `GuestSession.read_stats`. Made up; see `stats_of`."""
        async with self._operation("read_stats", timeout_s):
            return stats_of(self._guest)

    async def delete_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.delete_container`."""
        async with self._operation("delete_container", timeout_s):
            self._guest.delete(container_id)

    async def list_containers(self, *, timeout_s: float) -> Sequence[GuestContainerState]:
        """See `GuestSession.list_containers`."""
        async with self._operation("list_containers", timeout_s):
            return [container.state for container in self._guest.containers.values()]

    async def follow_logs(self, known: Mapping[str, LogPosition], *, timeout_s: float) -> MockLogFeed:
        """See `GuestSession.follow_logs`. Fault plans have no say: it happens beside all commands."""
        self.check()
        if self._feed is not None and not self._feed.closed:
            raise FailedPreconditionError("The logs are followed in this session already.")
        self._feed = MockLogFeed(self._guest.logs, known, self.check)
        self._guest.on_log = self._feed.wake
        return self._feed

    async def execute(
        self,
        process: GuestProcess,
        *,
        container_id: str | None,
        tty: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> RunningProcess:
        """See `GuestSession.execute`. A mock terminal is a pipe."""
        async with self._operation("execute", timeout_s):
            running = self._guest.execute(process, container_id)
            self._processes = {p for p in self._processes if not p.has_ended} | {running}
            return running

    async def copy(
        self, direction: CopyDirection, *, container_id: str, path: str, max_bytes: int, timeout_s: float
    ) -> RunningProcess:
        """See `GuestSession.copy`. A mock container keeps the last archive that was copied to a path."""
        async with self._operation("copy", timeout_s):
            running = self._guest.copy(direction, container_id, path)
            self._processes = {p for p in self._processes if not p.has_ended} | {running}
            return running

    async def attach(self, container_id: str, *, tty: bool, timeout_s: float) -> RunningProcess:
        """See `GuestSession.attach`. The main process of a mock container reads and writes nothing."""
        async with self._operation("attach", timeout_s):
            running = self._guest.attach(container_id)
            self._processes = {p for p in self._processes if not p.has_ended} | {running}
            return running

    async def connect_port(self, port: int, *, timeout_s: float) -> GuestConnection:
        """See `GuestSession.connect_port`. Port 7 of a mock guest echoes; nobody listens on others."""
        async with self._operation("connect_port", timeout_s):
            if port != ECHO_PORT:
                raise FailedPreconditionError(f"Port {port} of the pod: Connection refused.")
            connection = MockConnection()
            self._processes = {p for p in self._processes if not p.has_ended} | {connection}
            return connection

    async def ping(self, *, timeout_s: float) -> None:
        """See `GuestSession.ping`."""
        async with self._operation("ping", timeout_s):
            pass

    async def shutdown(self, *, timeout_s: float) -> None:
        """See `GuestSession.shutdown`. The mock VM powers off when it is stopped, and not by itself."""
        async with self._operation("shutdown", timeout_s):
            pass

    def events(self) -> AsyncIterator[GuestEvent]:
        """See `GuestSession.events`."""
        return self._events.read()

    async def close(self) -> None:
        """See `GuestSession.close`."""
        self._end("It was closed.", None)

    # -- for the agent -----------------------------------------------------------------------------

    def lose(self, reason: str) -> None:
        """The session ends without being closed. Idempotent."""
        self._end(reason, SessionLost(reason))

    def check(self) -> None:
        """Raise AgentError when the session is over."""
        if self._over is not None:
            raise AgentError(f"The session with the guest agent of {self._vm_id} is over: {self._over}")

    def _end(self, reason: str, event: SessionLost | None) -> None:
        if self._over is not None:
            return
        self._over = reason
        if self._guest.on_exit == self._on_event:
            self._guest.on_exit = self._guest.on_health = None
        for process in self._processes:
            process.lose(reason)
        self._events.end(event)
        if self._feed is not None:
            self._feed.wake()
        if self.watcher is not None and self.watcher is not asyncio.current_task():
            self.watcher.cancel()

    def _on_event(self, event: ContainerExited | ContainerHealth) -> None:
        if not self._events.push(event):
            self.lose("Events are not read.")

    @contextlib.asynccontextmanager
    async def _operation(self, verb: str, timeout_s: float) -> AsyncIterator[None]:
        """What comes before each call: is the session open, and what has the fault plan for it?"""
        self.check()
        async with deadline_as(
            timeout_s,
            lambda: DeadlineExceededError(
                f"The guest agent of {self._vm_id} did not answer {verb} within {timeout_s:g} s.",
                method=verb,
            ),
        ):
            await self._plan.hit(f"agent.{verb}", vm_id=self._vm_id)
            await _hears(self._vm)
            await asyncio.sleep(0)  # lets the watcher notice a VM that the plan has let die
        self.check()
        yield


async def _hears(vm: Vm) -> None:
    """A guest whose vCPUs are stopped answers nothing: only the caller's limit ends this."""
    if vm.paused:
        await asyncio.Event().wait()
