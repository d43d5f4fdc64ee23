"""A session with one guest's hyperstart: matches answers to commands, and streams and ends to processes."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from vcnode.drivers.agent.events import EventQueue
from vcnode.drivers.agent.hyperstart import copying, messages, wire
from vcnode.drivers.agent.hyperstart.dialogue import Dialogue, new_seq
from vcnode.drivers.agent.hyperstart.errors import RefusedError
from vcnode.drivers.agent.hyperstart.known import Known, Memory
from vcnode.drivers.agent.hyperstart.logs import HyperLogFeed, Outputs
from vcnode.drivers.agent.hyperstart.process import SIGKILL, HyperAttachment, OutputName, Running
from vcnode.drivers.agent.hyperstart.processes import Processes
from vcnode.drivers.agent.hyperstart.wire import Answer, Code, Dialect
from vcnode.drivers.agent.refusing import RefusingSession
from vcnode.drivers.base import (
    ContainerExited,
    CopyDirection,
    GuestEvent,
    LogFeed,
    LogPosition,
    RunningProcess,
    SessionLost,
)
from vcnode.errors import (
    AgentError,
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    UnsupportedError,
)
from vcnode.models.pod import AgentType, ContainerResources
from vcnode.models.vm import (
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestInfo,
    GuestProcess,
    Watchdog,
)

log = logging.getLogger(__name__)

CLOSE_KILL_LIMIT_S = 2.0
"""Seconds that the guest may take to kill what was executed, when the session is closed."""
MAX_INSTANCE = 1 << 53
PID_OF_MAIN = 1
"""hyperstart tells no process ids; each container's main process counts as its first."""


class HyperSession(RefusingSession):
    """A `GuestSession` over the two ports of a guest.

    Args:
        vm_id: Its VM.
        directory: Of that VM, for what the host must remember.
        fork: Whether the guest is clearcontainers'.
    """

    def __init__(self, vm_id: str, directory: Path, *, fork: bool = False) -> None:
        super().__init__(AgentType.HYPERSTART)
        self.vm_id = vm_id
        self._directory = directory
        self._memory = Memory.load(directory)
        kept = {cid: c for cid, c in self._memory.containers.items() if c.exit_code is None}
        self.dialogue = Dialogue(
            vm_id,
            [seq for known in kept.values() for seq in (known.stdio, known.stderr) if seq],
            fork=fork,
            on_event=self._on_event,
            on_piece=lambda piece: self._processes.on_piece(piece),
            on_lost=self._on_lost,
        )
        self._processes = Processes(self.dialogue)
        self._mains: dict[str, Running] = {}
        self._specs: dict[str, GuestContainer] = {}
        """Containers that were created in this session; started or not."""
        self._events = EventQueue()
        self._outputs = Outputs()
        for container_id, known in kept.items():
            self._watch_main(container_id, known, started=True)

    @property
    def dialect(self) -> Dialect:
        """The version that the guest speaks. Raises AgentError before it has said so."""
        return self.dialogue.dialect

    # -- GuestSession ------------------------------------------------------------------------------

    @property
    def info(self) -> GuestInfo:
        """See `GuestSession.info`. The guest tells its API version only."""
        return GuestInfo(agent_version=f"hyperstart API {self.dialect.version}", boot_id="", kernel="")

    async def configure(self, config: GuestConfig, *, timeout_s: float) -> None:
        """See `GuestSession.configure`: hostname, IPv4 and name servers; the clock is that of the VM's RTC.

        Once the pod runs, further interfaces and routes are set up each by itself.
        """
        if left := messages.left_out(config.endpoints):
            log.info("hyperstart in %s does not get %s", self.vm_id, ", ".join(left))
        async with self.dialogue.bounded("STARTPOD", timeout_s):
            if self._memory.pod_runs:
                await self._reconfigure(config)
                return
            payload = messages.start_pod(config, self.dialect)
            await self._start_pod(payload)
            await self.dialogue.command(Code.ONLINECPUMEM)

    async def _start_pod(self, payload: bytes) -> None:
        await self.dialogue.command(Code.STARTPOD, payload)
        self._memory.pod, self._memory.pod_runs = payload.decode(), True
        self._save()

    async def _reconfigure(self, config: GuestConfig) -> None:
        told = self._memory.pod or ""
        for index, endpoint in enumerate(config.endpoints):
            if not messages.interfaces([endpoint], self.dialect):
                continue
            payload = messages.encode(messages.interface(index, endpoint, self.dialect))
            if payload.decode() not in told:
                await self.dialogue.command(Code.SETUPINTERFACE, payload)
        routes = [r for r in messages.routes(config.endpoints) if messages.encode(r).decode() not in told]
        if routes:
            await self.dialogue.command(Code.SETUPROUTE, messages.encode({"routes": routes}))

    async def set_clock(self, time_ns: int, *, timeout_s: float) -> None:
        """Nothing: hyperstart has no command for it, and reads its RTC with STARTPOD only."""
        self.check()

    async def set_watchdog(self, watchdog: Watchdog, *, timeout_s: float) -> None:
        """Refused."""
        self._refuse("watchdog")

    async def create_container(self, container: GuestContainer, *, timeout_s: float) -> None:
        """See `GuestSession.create_container`: kept here, for the guest makes and starts it at once.

        Raises:
            UnsupportedError: It wants something that the protocol cannot say.
        """
        self.check()
        container_id = container.container_id
        if container_id in self._specs or container_id in self._memory.containers:
            raise AlreadyExistsError(f"The guest has a container {container_id} already.")
        check_container(container)
        messages.process(
            container.process, self.dialect, process_id="", stdio=1, stderr=0, terminal=container.tty
        )
        self._specs[container_id] = container

    async def start_container(self, container_id: str, *, timeout_s: float) -> int:
        """See `GuestSession.start_container`. Whether it started is unknown after a time-out.

        Raises:
            NotFoundError: There is no such container, or it was made in an earlier session: create it anew.
            AgentError: The guest refused, and says not why; its console may.
        """
        spec = self._specs.get(container_id)
        if spec is None:
            raise NotFoundError(f"The guest has no container {container_id}.")
        known = self._memory.containers.get(container_id)
        if known is not None and known.exit_code is None:
            raise FailedPreconditionError(f"Container {container_id} runs already.")
        async with self.dialogue.bounded("NEWCONTAINER", timeout_s):
            if known is not None:
                await self._remove(container_id)
            try:
                await self._new_container(spec)
            except RefusedError:
                # The guest may have cleaned up meanwhile: its last container ended as this was sent.
                if not self.dialect.cleans_up or self._alive:
                    raise
                self._memory.pod_runs = False
                await self._new_container(spec)
        return PID_OF_MAIN

    async def _new_container(self, spec: GuestContainer) -> None:
        container_id = spec.container_id
        if not self._memory.pod_runs and self._memory.pod is not None:
            await self._start_pod(self._memory.pod.encode())
        known = Known(
            stdio=new_seq(),
            stderr=0 if spec.tty else new_seq(),
            terminal=spec.tty,
            instance=secrets.randbelow(MAX_INSTANCE) + 1,
        )
        main = messages.process(
            spec.process,
            self.dialect,
            process_id=messages.MAIN,
            stdio=known.stdio,
            stderr=known.stderr,
            terminal=spec.tty,
        )
        payload = messages.container(spec, main)
        self._memory.containers[container_id] = known
        try:
            self._save()  # before the guest has it: what runs is never forgotten
        except AgentError:
            del self._memory.containers[container_id]
            raise
        running = self._watch_main(container_id, known)

        def on_answer(answer: Answer) -> None:
            running.started = answer.ok
            if not answer.ok:
                self._processes.forget(running)
                self._mains.pop(container_id, None)
                self._memory.containers.pop(container_id, None)
                self._save()

        await self.dialogue.command(Code.NEWCONTAINER, payload, on_answer=on_answer)
        if not spec.stdin and not spec.tty:
            running.input_ended = True
            self._processes.end_input(running)

    async def signal_container(
        self, container_id: str, number: int, *, everyone: bool, timeout_s: float
    ) -> None:
        """See `GuestSession.signal_container`. *everyone*: the main process and what was executed beside it.

        The end of the main process ends all others in any case.
        """
        running = self._main(container_id)
        if running is None:
            return
        async with self.dialogue.bounded("KILLCONTAINER", timeout_s):
            if everyone and self.dialect.named_processes:
                for other in self._processes.of(container_id):
                    await self._processes.signal(other, number)
            if number == SIGKILL:
                self._processes.kills(running)
            payload = messages.kill_container(container_id, number, self.dialect, everyone=everyone)
            try:
                await self.dialogue.command(Code.KILLCONTAINER, payload)
            except RefusedError:
                if running.exit is None and not running.eof:
                    raise

    async def delete_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.delete_container`."""
        self.check()
        async with self.dialogue.bounded("REMOVECONTAINER", timeout_s):
            running = self._mains.get(container_id)
            if running is not None and running.exit is None:
                await self.signal_container(container_id, SIGKILL, everyone=True, timeout_s=timeout_s)
                while running.exit is None:
                    changed = running.changed
                    self.check()
                    await changed.wait()
            await self._remove(container_id)
            self._specs.pop(container_id, None)
            self._outputs.forget(container_id)

    async def _remove(self, container_id: str) -> None:
        """Have the guest forget a container that has ended."""
        if container_id in self._memory.containers:
            if self._memory.pod_runs or not self.dialect.cleans_up:
                await self.dialogue.command(Code.REMOVECONTAINER, messages.remove_container(container_id))
            self._mains.pop(container_id, None)
            del self._memory.containers[container_id]
            self._save()

    async def list_containers(self, *, timeout_s: float) -> Sequence[GuestContainerState]:
        """See `GuestSession.list_containers`; by what the host remembers, and the guest has told since.

        Raises:
            AgentError: It does not answer.
        """
        async with self.dialogue.bounded("KILLCONTAINER", timeout_s):
            for container_id in [cid for cid, running in self._mains.items() if running.exit is None]:
                await self._see_that_it_is_there(container_id)
        return tuple(self._state(container_id) for container_id in {**self._memory.containers, **self._specs})

    async def _see_that_it_is_there(self, container_id: str) -> None:
        """Signal 0 reaches nobody, and is refused for a container that the guest does not have."""
        running = self._mains[container_id]
        try:
            payload = messages.kill_container(container_id, 0, self.dialect, everyone=False)
            await self.dialogue.command(Code.KILLCONTAINER, payload)
        except RefusedError:
            if running.exit is None:
                self._processes.finish(running)

    def _state(self, container_id: str) -> GuestContainerState:
        known = self._memory.containers.get(container_id)
        if known is None:
            return GuestContainerState(container_id=container_id, state="created")
        if known.exit_code is None:
            return GuestContainerState(container_id=container_id, state="running", pid=PID_OF_MAIN)
        return GuestContainerState(container_id=container_id, state="stopped", exit_code=known.exit_code)

    async def follow_logs(self, known: Mapping[str, LogPosition], *, timeout_s: float) -> LogFeed:
        """See `GuestSession.follow_logs`. What was written while no session was open is lost."""
        self.check()
        if self._outputs.followed:
            raise FailedPreconditionError(f"The outputs of {self.vm_id} are followed already.")
        self._outputs.followed = True
        self._outputs.resume(known)
        return HyperLogFeed(self._outputs, self.check)

    async def execute(
        self,
        process: GuestProcess,
        *,
        container_id: str | None,
        tty: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> RunningProcess:
        """See `GuestSession.execute`. A process whose start nobody waits for any more is killed."""
        async with self.dialogue.bounded("EXECCMD", timeout_s):
            if container_id is None:
                if not self.dialect.guest_exec:
                    self._refuse("commands outside of containers")
            elif self._main(container_id) is None:
                raise FailedPreconditionError(f"Container {container_id} does not run.")
            return await self._processes.execute(process, container_id or messages.IN_GUEST, tty)

    async def copy(
        self, direction: CopyDirection, *, container_id: str, path: str, max_bytes: int, timeout_s: float
    ) -> RunningProcess:
        """See `GuestSession.copy`. The container must run; only plain files, without owner, mode and time."""
        if self._main(container_id) is None:
            raise FailedPreconditionError(
                f"Container {container_id} does not run; hyperstart copies in running containers only."
            )
        files = copying.Files(
            read=functools.partial(self._read_file, container_id),
            write=functools.partial(self._write_file, container_id),
        )
        if direction == "in":
            return copying.CopyIn(files, path, max_bytes)
        return copying.CopyOut(files, path, max_bytes)

    async def _read_file(self, container_id: str, path: str, max_bytes: int) -> bytes:
        payload = messages.file_command(container_id, path)
        async with self.dialogue.bounded("READFILE", copying.FILE_LIMIT_S):
            return await self.dialogue.command(Code.READFILE, payload, max_answer=max_bytes)

    async def _write_file(self, container_id: str, path: str, data: bytes) -> None:
        payload = messages.file_command(container_id, path) + data
        async with self.dialogue.bounded("WRITEFILE", copying.FILE_LIMIT_S):
            await self.dialogue.command(Code.WRITEFILE, payload)

    async def attach(self, container_id: str, *, tty: bool, timeout_s: float) -> RunningProcess:
        """See `GuestSession.attach`."""
        running = self._main(container_id)
        if running is None:
            raise FailedPreconditionError(f"Container {container_id} does not run.")
        return HyperAttachment(self._processes, running)

    async def ping(self, *, timeout_s: float) -> None:
        """See `GuestSession.ping`."""
        async with self.dialogue.bounded("PING", timeout_s):
            await self.dialogue.command(Code.PING)

    async def shutdown(self, *, timeout_s: float) -> None:
        """See `GuestSession.shutdown`: DESTROYPOD. The guest answers once its last container has ended."""
        async with self.dialogue.bounded("DESTROYPOD", timeout_s):
            await self.dialogue.command(Code.DESTROYPOD)

    def events(self) -> AsyncIterator[GuestEvent]:
        """See `GuestSession.events`. For one reader."""
        return self._events.read()

    async def close(self) -> None:
        """See `GuestSession.close`. Without ids of processes execs are left to the end of their input."""
        self._events.end()
        if not self.dialogue.is_over:
            try:
                async with self.dialogue.bounded("SIGNALPROCESS", CLOSE_KILL_LIMIT_S):
                    await self._processes.kill_all()
            except AgentError as exc:
                log.info("What was executed in %s may go on", self.vm_id, exc_info=exc)
        self.dialogue.abort()
        self._wake_all()
        await self.dialogue.close()

    # -- containers --------------------------------------------------------------------------------

    @property
    def _alive(self) -> bool:
        return any(running.exit is None for running in self._mains.values())

    def _main(self, container_id: str) -> Running | None:
        """The main process; None when it does not run. Raises NotFoundError."""
        self.check()
        if container_id not in self._specs and container_id not in self._memory.containers:
            raise NotFoundError(f"The guest has no container {container_id}.")
        running = self._mains.get(container_id)
        return None if running is None or running.exit is not None else running

    def _watch_main(self, container_id: str, known: Known, *, started: bool = False) -> Running:
        running = Running(
            container_id=container_id,
            process_id=messages.MAIN,
            stdio=known.stdio,
            stderr=known.stderr,
            terminal=known.terminal,
            started=started,
        )
        self._outputs.begin(container_id, known.instance, earlier=started)

        def on_output(name: OutputName, data: bytes) -> None:
            self._outputs.add(container_id, name, data)

        running.on_output = on_output
        running.on_end = functools.partial(self._container_ended, container_id, known)
        self._mains[container_id] = running
        self._processes.add(running)
        return running

    def _container_ended(self, container_id: str, known: Known, exit_code: int) -> None:
        known.exit_code = exit_code
        if self.dialect.cleans_up and not self._alive:
            self._memory.pod_runs = False
        self._save()
        self._outputs.end(container_id)
        exited = ContainerExited(container_id=container_id, exit_code=exit_code, oom_killed=False)
        if not self._events.push(exited):
            self.dialogue.fail("The guest reported more than anybody reads.")

    # -- what comes --------------------------------------------------------------------------------

    def _on_event(self, event: wire.ProcessEnded | wire.PodFinished) -> None:
        if isinstance(event, wire.ProcessEnded):
            self._processes.on_end(event)
        elif self.dialect.cleans_up and not self._alive:
            # The guest has forgotten its containers; their ends come by their streams, or have come.
            self._memory.pod_runs = False
            self._save()

    def _on_lost(self, reason: str) -> None:
        self._events.end(SessionLost(reason))
        self._wake_all()

    def _wake_all(self) -> None:
        self._processes.wake_all()
        self._outputs.wake()

    def _save(self) -> None:
        self._memory.save(self._directory)

    def check(self) -> None:
        """Raise AgentError when the session is over."""
        self.dialogue.check()

    def _check(self) -> None:
        self.dialogue.check()


def check_container(container: GuestContainer) -> None:
    """See that the protocol can say what a container wants. Pure.

    Raises:
        UnsupportedError: It cannot; names the field of the container.
    """
    wants = {
        "image": container.root.shared_name is None,
        "readonly_rootfs": container.readonly,
        "secrets": bool(container.secrets),
        "probes": container.probes != type(container.probes)(),
        "resources": container.resources != ContainerResources(),
    }
    for name, wanted in wants.items():
        if wanted:
            raise UnsupportedError(f"{name}: hyperstart has no command for it.", field=name)
