"""The simulated guests: what is in them outlives every session, and ends with the VM."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime

from vcnode.drivers.agent.mock.logs import MockLog
from vcnode.drivers.agent.mock.process import (
    HARMLESS_SIGNALS,
    SIGKILL,
    MockAttachment,
    MockProcess,
    MockReceiver,
)
from vcnode.drivers.agent.mock.shell import Program, Sleep, Write, compile_process, find_user
from vcnode.drivers.base import ContainerExited, ContainerHealth, CopyDirection
from vcnode.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from vcnode.guest.health import Health, ProbeSpec
from vcnode.models.living import ContainerProcess
from vcnode.models.pod import ContainerResources
from vcnode.models.probes import Probes
from vcnode.models.vm import GuestConfig, GuestContainer, GuestContainerState, GuestProcess, Watchdog

FIRST_PID = 100


class MockContainer:
    """One container: its main process is a timer at most, with /dev/null for a stdin."""

    def __init__(self, spec: GuestContainer, program: Program, wrote: Callable[[], None]) -> None:
        self.spec = spec
        self.program = program
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.finished_at: datetime | None = None
        self.execs: set[MockProcess] = set()
        self.attached: set[MockAttachment] = set()
        """Who is attached to the main process."""
        self.archives: dict[str, bytes] = {}
        """What was copied in, by path."""
        self.timer: asyncio.Handle | None = None
        self.started_at: datetime | None = None
        self.log = MockLog(spec.container_id, wrote)
        self.writes: list[asyncio.Handle] = []
        """What it will write after sleeping."""
        self.paused = False
        self.health: Health
        """Set as soon as it is made."""
        self.probe_failure: str | None = None
        self.pending_signals: list[int] = []
        """What comes when it is resumed."""

    @property
    def is_running(self) -> bool:
        """Whether the main process lives."""
        return self.pid is not None

    @property
    def state(self) -> GuestContainerState:
        """As ``list_containers`` tells it."""
        stopped = "created" if self.exit_code is None else "stopped"
        return GuestContainerState(
            container_id=self.spec.container_id,
            state=("paused" if self.paused else "running") if self.is_running else stopped,
            pid=self.pid,
            exit_code=None if self.is_running else self.exit_code,
            resources=self.spec.resources,
            ready=self.health.ready,
            probe_failure=self.probe_failure,
            finished_at=None if self.is_running else self.finished_at,
        )


class MockGuest:
    """One guest.

    Attributes:
        config: What ``configure`` gave it last.
        available_bytes: Memory that it says it could give away.
        watchdog: What its watchdog was given last, if anything.
        containers: By id.
        on_log: Called when a container has written something; None while nobody follows.
        on_exit: Where the open session wants to hear of ended containers; None while there is none.
        on_health: The same for what probes say.
        is_paused: Whether the vCPUs are stopped: then no process ends by itself.
    """

    def __init__(self) -> None:
        self.config: GuestConfig | None = None
        self.watchdog: Watchdog | None = None
        self.available_bytes = 400 << 20
        self.containers: dict[str, MockContainer] = {}
        self.on_exit: Callable[[ContainerExited], None] | None = None
        self.on_health: Callable[[ContainerHealth], None] | None = None
        self.is_paused: Callable[[], bool] = lambda: False
        self.on_log: Callable[[], None] | None = None
        self._overdue: list[tuple[MockContainer, int]] = []
        self._next_pid = FIRST_PID

    def find(self, container_id: str) -> MockContainer:
        """The container of this id. Raises NotFoundError."""
        if (container := self.containers.get(container_id)) is None:
            raise NotFoundError(f"The guest has no container {container_id}.")
        return container

    def create(self, spec: GuestContainer) -> None:
        """See `GuestSession.create_container`."""
        if spec.container_id in self.containers:
            raise AlreadyExistsError(f"The guest has a container {spec.container_id} already.")
        program = compile_process(spec.process, spec.hostname)
        container = self.containers[spec.container_id] = MockContainer(spec, program, self._log_changed)
        container.health = self._health_of(container)

    def start(self, container_id: str) -> int:
        """See `GuestSession.start_container`."""
        container = self.find(container_id)
        if container.is_running:
            raise FailedPreconditionError.state(
                f"Container {container_id}", "running", ["created", "stopped"], "start"
            )
        container.pid = pid = self._next_pid
        container.started_at = datetime.now(UTC)
        container.probe_failure = None
        container.health.start()
        self._next_pid += 1
        loop = asyncio.get_running_loop()
        seconds = 0.0
        for step in container.program.steps:  # reading from /dev/null takes no time: only sleeping does
            if isinstance(step, Sleep):
                seconds += step.seconds
            elif isinstance(step, Write) and not math.isinf(seconds):
                if seconds:
                    container.writes.append(loop.call_later(seconds, container.log.add, step.to, step.data))
                else:
                    container.log.add(step.to, step.data)
        if not math.isinf(seconds):
            code = container.program.exit_code
            container.timer = (
                loop.call_later(seconds, self._end_by_itself, container, code)
                if seconds
                else loop.call_soon(self._end_by_itself, container, code)
            )
        return pid

    def signal(self, container_id: str, number: int, *, everyone: bool) -> None:
        """See `GuestSession.signal_container`."""
        container = self.find(container_id)
        if container.paused and number != SIGKILL:
            container.pending_signals.append(number)
            return
        if everyone:
            for process in list(container.execs):
                process.kill(number)
        if container.is_running and number not in HARMLESS_SIGNALS:
            self._end(container, 128 + number)

    def pause(self, container_id: str) -> None:
        """See `GuestSession.pause_container`."""
        container = self.find(container_id)
        if not container.is_running:
            raise FailedPreconditionError.state(
                f"Container {container_id}", container.state.state, ["running"], "pause"
            )
        container.paused = True
        container.health.pause()

    def resume(self, container_id: str) -> None:
        """See `GuestSession.resume_container`."""
        container = self.find(container_id)
        if container.paused:
            container.paused = False
            container.health.resume()
            signals, container.pending_signals = container.pending_signals, []
            for number in signals:
                self.signal(container_id, number, everyone=False)
            self.catch_up()

    def update(self, container_id: str, resources: ContainerResources) -> None:
        """See `GuestSession.update_container`. A container has one process, and one for each exec."""
        container = self.find(container_id)
        used = int(container.is_running) + len(container.execs)
        if resources.pids_limit is not None and used > resources.pids_limit:
            raise FailedPreconditionError(f"Container {container_id} has {used} processes.")
        container.spec = container.spec.model_copy(update={"resources": resources})

    def _health_of(self, container: MockContainer) -> Health:
        loop = asyncio.get_running_loop()
        return Health(
            probe_specs(container.spec.probes),
            timers=loop,
            now=loop.time,
            attempt=lambda spec, done: self._try(container, spec, done),
            changed=lambda: self._tell_health(container),
            failed=lambda why: self._unhealthy(container, why),
        )

    def _try(
        self, container: MockContainer, spec: ProbeSpec, done: Callable[[str | None], None]
    ) -> Callable[[], None]:
        """A probe of the mock: commands do what the mock's shell makes of them, everything listens."""
        if self.is_paused() or spec.action.exec is None:
            done(None)
            return lambda: None
        args = spec.action.exec.args
        process = container.spec.process.model_copy(update={"args": args})
        program = compile_process(process, container.spec.hostname)
        seconds = sum(step.seconds for step in program.steps if isinstance(step, Sleep))
        why = f"exit code {program.exit_code}" if program.exit_code else None
        if not seconds:
            done(why)
            return lambda: None
        if math.isinf(seconds):
            return lambda: None
        return asyncio.get_running_loop().call_later(seconds, done, why).cancel

    def _tell_health(self, container: MockContainer) -> None:
        if self.on_health is not None:
            self.on_health(ContainerHealth(container.spec.container_id, container.health.ready))

    def _unhealthy(self, container: MockContainer, why: str) -> None:
        container.probe_failure = why
        self._tell_health(container)
        number = container.spec.stop_signal if container.spec.stop_timeout_s else SIGKILL
        self._end(container, 128 + number)

    def processes(self, container_id: str) -> list[ContainerProcess]:
        """See `GuestSession.list_processes`."""
        container = self.find(container_id)
        if container.pid is None or container.started_at is None:
            return []
        args = container.spec.process.args
        return [
            ContainerProcess(
                pid=container.pid,
                ppid=0,
                container_pid=1,
                uid=find_user(container.spec.process.user),
                state="S",
                cpu_ms=0,
                rss_bytes=0,
                started_at=container.started_at,
                name=args[0].rpartition("/")[2][:15],
                args=args,
            )
        ]

    def delete(self, container_id: str) -> None:
        """See `GuestSession.delete_container`."""
        if (container := self.containers.get(container_id)) is not None:
            if container.is_running:
                self._end(container, 128 + SIGKILL)
            del self.containers[container_id]

    def logs(self) -> list[MockLog]:
        """What each container has written."""
        return [container.log for container in self.containers.values()]

    def _log_changed(self) -> None:
        if self.on_log is not None:
            self.on_log()

    def execute(self, process: GuestProcess, container_id: str | None) -> MockProcess:
        """See `GuestSession.execute`."""
        if container_id is None:
            return MockProcess(compile_process(process, self.config.hostname if self.config else "mock"))
        container = self.find(container_id)
        if not container.is_running or container.paused:
            raise FailedPreconditionError.state(
                f"Container {container_id}", container.state.state, ["running"], "execute"
            )
        running = MockProcess(compile_process(process, container.spec.hostname))
        container.execs = {p for p in container.execs if not p.has_ended} | {running}
        return running

    def attach(self, container_id: str) -> MockAttachment:
        """See `GuestSession.attach`."""
        container = self.find(container_id)
        if not container.is_running:
            raise FailedPreconditionError.state(
                f"Container {container_id}", container.state.state, ["running"], "attach"
            )
        attached = MockAttachment(lambda number: self.signal(container_id, number, everyone=False))
        container.attached = {a for a in container.attached if not a.has_ended} | {attached}
        return attached

    def copy(self, direction: CopyDirection, container_id: str, path: str) -> MockProcess:
        """See `GuestSession.copy`."""
        container = self.find(container_id)
        if direction == "in":
            return MockReceiver(lambda archive: container.archives.update({path: archive}))
        if (archive := container.archives.get(path)) is None:
            told = json.dumps(["not_found", f"A mock container has no {path} that was not copied there."])
            return MockProcess(Program((Write("stderr", told.encode()),), 1))
        return MockProcess(Program((Write("stdout", archive),)))

    def power_off(self) -> None:
        """The VM is gone, with all that ran in it; nobody hears of its containers."""
        self.on_exit = None
        for container in self.containers.values():
            if container.is_running:
                self._end(container, 128 + SIGKILL)

    def catch_up(self) -> None:
        """Something runs again: what would have ended meanwhile ends now."""
        overdue, self._overdue = self._overdue, []
        for container, exit_code in overdue:
            if container.is_running:
                self._end_by_itself(container, exit_code)

    def _end_by_itself(self, container: MockContainer, exit_code: int) -> None:
        if self.is_paused() or container.paused:
            self._overdue.append((container, exit_code))
        else:
            self._end(container, exit_code)

    def _end(self, container: MockContainer, exit_code: int) -> None:
        """The main process ends, and the rest of its pid namespace with it."""
        if container.timer is not None:
            container.timer.cancel()
            container.timer = None
        container.health.stop()
        for write in container.writes:
            write.cancel()
        container.writes.clear()
        container.log.add("end", b"")
        for process in container.execs:
            process.kill(SIGKILL)
        container.execs.clear()
        for attached in container.attached:
            attached.main_ended(exit_code)
        container.attached.clear()
        container.pid, container.exit_code, container.finished_at = None, exit_code, datetime.now(UTC)
        container.paused = False
        container.pending_signals.clear()
        if self.on_exit is not None:
            self.on_exit(
                ContainerExited(
                    container.spec.container_id,
                    exit_code,
                    oom_killed=False,
                    probe_failure=container.probe_failure,
                )
            )


class MockGuests:
    """All mock guests, by VM id. Give them to a new `MockAgent` to restart the node agent."""

    def __init__(self) -> None:
        self.by_vm_id: dict[str, MockGuest] = {}


def probe_specs(probes: Probes) -> dict[str, ProbeSpec]:
    """The probes of a container by name; the action of each is the `Probe` itself."""
    named = {"startup": probes.startup, "readiness": probes.readiness, "liveness": probes.liveness}
    return {
        name: ProbeSpec(
            probe,
            initial_delay_s=probe.initial_delay_s,
            period_s=probe.period_s,
            timeout_s=probe.timeout_s,
            success_threshold=probe.success_threshold,
            failure_threshold=probe.failure_threshold,
        )
        for name, probe in named.items()
        if probe is not None
    }
