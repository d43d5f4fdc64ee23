"""A session with one guest's hyperstart: matches answers to commands, and streams and ends to processes."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from vcnode.drivers.agent.events import EventQueue
from vcnode.drivers.agent.hyperstart import copying, messages, wire
from vcnode.drivers.agent.hyperstart.dialogue import Dialogue, new_seq
from vcnode.drivers.agent.hyperstart.errors import RefusedError
from vcnode.drivers.agent.hyperstart.known import Known, Memory
from vcnode.drivers.agent.hyperstart.logs import HyperLogFeed, Outputs
from vcnode.drivers.agent.hyperstart.process import (
    SIGKILL,
    HyperAttachment,
    HyperProcess,
    OutputName,
    Running,
)
from vcnode.drivers.agent.hyperstart.wire import Answer, Code, Dialect, ProtocolError
from vcnode.drivers.base import (
    ContainerExited,
    CopyDirection,
    GuestConnection,
    GuestEvent,
    LogFeed,
    LogPosition,
    RunningProcess,
    SessionLost,
)
from vcnode.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    UnsupportedError,
)
from vcnode.models.living import ContainerProcess
from vcnode.models.pod import ContainerResources
from vcnode.models.stats import ContainerStats, GuestStats
from vcnode.models.vm import (
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestInfo,
    GuestProcess,
    Watchdog,
)

log = logging.getLogger(__name__)

LINGER_S = 2.0
"""Seconds that the last output of a process may take after the guest has told its end."""
SIGNAL_LIMIT_S = 10.0
"""Seconds for the answer to a signal or a window size; the Protocol gives those no limit of their own."""
MAX_INSTANCE = 1 << 53
PID_OF_MAIN = 1
"""hyperstart tells no process ids; each container's main process counts as its first."""


class HyperSession:
    """A `GuestSession` over the two ports of a guest.

    Args:
        vm_id: Its VM.
        directory: Of that VM, for what the host must remember.
        fork: Whether the guest is clearcontainers'.
    """

    def __init__(self, vm_id: str, directory: Path, *, fork: bool = False) -> None:
        self.vm_id = vm_id
        self._directory = directory
        self._memory = Memory.load(directory)
        kept = {cid: c for cid, c in self._memory.containers.items() if c.exit_code is None}
        self.dialogue = Dialogue(
            vm_id,
            [seq for known in kept.values() for seq in (known.stdio, known.stderr) if seq],
            fork=fork,
            on_event=self._on_event,
            on_piece=self._on_piece,
            on_lost=self._on_lost,
        )
        self._by_seq: dict[int, Running] = {}
        self._mains: dict[str, Running] = {}
        self._specs: dict[str, GuestContainer] = {}
        """Containers that were created in this session; started or not."""
        self._process_ids = itertools.count(1)
        self._session_id = secrets.token_hex(4)
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
            log.warning("hyperstart in %s does not get %s", self.vm_id, ", ".join(left))
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
        self._refuse("ends by itself")

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
        self._save()  # before the guest has it: what runs is never forgotten
        running = self._watch_main(container_id, known)

        def on_answer(answer: Answer) -> None:
            running.started = answer.ok
            if not answer.ok:
                self._forget_running(running)
                self._memory.containers.pop(container_id, None)
                self._save()

        await self.dialogue.command(Code.NEWCONTAINER, payload, on_answer=on_answer)
        if not spec.stdin and not spec.tty:
            running.input_ended = True
            self.end_input(running)

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
                for other in self._execs(container_id):
                    await self._signal(other, number)
            if number == SIGKILL:
                self._kills(running)
            payload = messages.kill_container(container_id, number, self.dialect, everyone=everyone)
            try:
                await self.dialogue.command(Code.KILLCONTAINER, payload)
            except RefusedError:
                if running.exit is None and not running.eof:
                    raise

    async def pause_container(self, container_id: str, *, timeout_s: float) -> None:
        """Refused."""
        self._refuse("freezes containers")

    async def resume_container(self, container_id: str, *, timeout_s: float) -> None:
        """Refused."""
        self._refuse("freezes containers")

    async def update_container(
        self, container_id: str, resources: ContainerResources, *, timeout_s: float
    ) -> None:
        """Refused."""
        self._refuse("limits containers")

    async def available_memory(self, *, timeout_s: float) -> int:
        """Refused."""
        self._refuse("tells its memory")

    async def list_processes(
        self, container_id: str, *, limit: int, timeout_s: float
    ) -> tuple[Sequence[ContainerProcess], int]:
        """Refused."""
        self._refuse("lists processes")

    async def read_stats(self, *, timeout_s: float) -> tuple[GuestStats, Sequence[ContainerStats]]:
        """Refused."""
        self._refuse("counts what is used")

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
                running.finish(signal_deaths_are_zero=False)

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
                    self._refuse("runs commands outside of containers")
            elif self._main(container_id) is None:
                raise FailedPreconditionError(f"Container {container_id} does not run.")
            running = Running(
                container_id=container_id or messages.IN_GUEST,
                process_id=f"x{next(self._process_ids)}-{self._session_id}",
                stdio=new_seq(),
                stderr=0 if tty else new_seq(),
                terminal=tty is not None,
            )
            wanted = messages.process(
                process,
                self.dialect,
                process_id=running.process_id,
                stdio=running.stdio,
                stderr=running.stderr,
                terminal=running.terminal,
            )
            handle = HyperProcess(self, running)
            self._by_seq |= dict.fromkeys(running.seqs, running)  # output may come before the answer
            try:
                payload = messages.execute(running.container_id, wanted)
                on_answer = functools.partial(self._on_execute, running)
                await self.dialogue.command(Code.EXECCMD, payload, on_answer=on_answer)
                if tty is not None:
                    await self._resize(running, *tty)
            except asyncio.CancelledError:
                handle.discard()
                raise
        return handle

    def _on_execute(self, running: Running, answer: Answer) -> None:
        running.started = answer.ok
        if not answer.ok:
            self._forget_running(running)
        elif running.killed or all(reader.closed for reader in running.readers):
            self.kill_unasked(running)

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
        return HyperAttachment(self, running)

    async def connect_port(self, port: int, *, timeout_s: float) -> GuestConnection:
        """Refused."""
        self._refuse("connects to ports")

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
        """See `GuestSession.close`. Without ids of processes (4242) execs are left to their end of input."""
        if not self.dialogue.is_over:
            for running in {r for r in self._by_seq.values() if r not in self._mains.values()}:
                self.kill_unasked(running)
        self._events.end()
        self.dialogue.abort()
        self._wake_all()
        await self.dialogue.close()

    # -- for the processes: `process.Owner` --------------------------------------------------------

    def check(self) -> None:
        """Raise AgentError when the session is over."""
        self.dialogue.check()

    async def write_input(self, running: Running, data: memoryview) -> None:
        """See `process.Owner`."""
        await self.dialogue.write_input(running.stdio, data, lambda: running.exit is None and not running.eof)

    def end_input(self, running: Running) -> None:
        """See `process.Owner`."""
        self.dialogue.end_input(running.stdio)

    async def signal_process(self, running: Running, number: int) -> None:
        """See `process.Owner`. Raises UnsupportedError where processes have no ids."""
        async with self.dialogue.bounded("SIGNALPROCESS", SIGNAL_LIMIT_S):
            await self._signal(running, number)

    async def _signal(self, running: Running, number: int) -> None:
        if running.exit is not None:
            return
        if number == SIGKILL:
            self._kills(running)
        try:
            if running is self._mains.get(running.container_id):
                payload = messages.kill_container(running.container_id, number, self.dialect, everyone=False)
                await self.dialogue.command(Code.KILLCONTAINER, payload)
            elif self.dialect.named_processes:
                payload = messages.signal_process(running.container_id, running.process_id, number)
                await self.dialogue.command(Code.SIGNALPROCESS, payload)
            else:
                self._refuse("signals what was executed")
        except RefusedError:
            if running.exit is None and not running.eof and running.code is None:
                raise

    def _kills(self, running: Running) -> None:
        """Nobody need read what a process that is killed has written; it must not keep its end from us."""
        running.killed = True
        self.look_at_readers()

    async def resize_process(self, running: Running, rows: int, columns: int) -> None:
        """See `process.Owner`."""
        async with self.dialogue.bounded("WINSIZE", SIGNAL_LIMIT_S):
            await self._resize(running, rows, columns)

    async def _resize(self, running: Running, rows: int, columns: int) -> None:
        payload = messages.window(
            running.container_id, running.process_id, running.stdio, rows, columns, self.dialect
        )
        try:
            await self.dialogue.command(Code.WINSIZE, payload)
        except RefusedError:
            if running.exit is None and not running.eof and running.code is None:
                raise

    def kill_unasked(self, running: Running) -> None:
        """See `process.Owner`. Where processes have no ids, all that can be done is to end its input."""
        self._kills(running)
        if self.dialogue.is_over or not running.started:
            return  # a start under way: its answer leads here again
        if self.dialect.named_processes:
            payload = messages.signal_process(running.container_id, running.process_id, SIGKILL)
            self.dialogue.send(Code.SIGNALPROCESS, payload, _ignore)
        elif not running.terminal and not running.input_ended:
            running.input_ended = True
            self.end_input(running)

    def look_at_readers(self) -> None:
        """See `process.Owner`."""
        behind = any(
            reader.is_behind
            for running in set(self._by_seq.values())
            if not running.killed
            for reader in running.readers
        )
        self.dialogue.tty.hold(behind)

    # -- containers and processes ------------------------------------------------------------------

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

    def _execs(self, container_id: str) -> list[Running]:
        found = {r for r in self._by_seq.values() if r.container_id == container_id and r.exit is None}
        return [r for r in found if r is not self._mains.get(container_id) and r.started]

    def _watch_main(self, container_id: str, known: Known, *, started: bool = False) -> Running:
        running = Running(
            container_id=container_id,
            process_id=messages.MAIN,
            stdio=known.stdio,
            stderr=known.stderr,
            terminal=known.terminal,
            started=started,
        )
        self._outputs.begin(container_id, known.instance)

        def on_output(name: OutputName, data: bytes) -> None:
            self._outputs.add(container_id, name, data)

        running.on_output = on_output
        running.on_end = functools.partial(self._container_ended, container_id, known)
        self._mains[container_id] = running
        self._by_seq |= dict.fromkeys(running.seqs, running)
        return running

    def _container_ended(self, container_id: str, known: Known, exit_code: int) -> None:
        for seq in (known.stdio, known.stderr):
            self._by_seq.pop(seq, None)
        known.exit_code = exit_code
        if self.dialect.cleans_up and not self._alive:
            self._memory.pod_runs = False
        self._save()
        self._outputs.end(container_id)
        exited = ContainerExited(container_id=container_id, exit_code=exit_code, oom_killed=False)
        if not self._events.push(exited):
            self.dialogue.fail("The guest reported more than anybody reads.")

    def _forget_running(self, running: Running) -> None:
        """It was not started."""
        for seq in running.seqs:
            self._by_seq.pop(seq, None)
        if self._mains.get(running.container_id) is running:
            del self._mains[running.container_id]
        running.on_end = None
        running.finish(signal_deaths_are_zero=False)

    # -- what comes --------------------------------------------------------------------------------

    def _on_event(self, event: wire.ProcessEnded | wire.PodFinished) -> None:
        if isinstance(event, wire.ProcessEnded):
            self._process_ended(event)
        elif self.dialect.cleans_up and not self._alive:
            # The guest has forgotten its containers; their ends come by their streams, or have come.
            self._memory.pod_runs = False
            self._save()

    def _on_piece(self, piece: wire.Piece) -> None:
        running = self._by_seq.get(piece.seq)
        if running is None:
            return  # of a process of an earlier session, or the end of one that has ended
        if not piece.data:
            # Also said of a process that has just ended, to input that came too late.
            running.eof = running.eof or piece.seq == running.stdio
        elif not running.eof:
            running.take(piece.seq, piece.data)
        elif piece.seq == running.stdio and len(piece.data) == 1 and self.dialect.exit_on_stream:
            running.code = piece.data[0] if running.code is None else running.code
        else:
            raise ProtocolError("output after its end")
        self._look_whether_ended(running)
        self.look_at_readers()

    def _process_ended(self, event: wire.ProcessEnded) -> None:
        for running in set(self._by_seq.values()):
            if (running.container_id, running.process_id) == (event.container, event.process):
                running.code = event.status if running.code is None else running.code
                self._look_whether_ended(running)
                if running.exit is None:
                    # What it has left running may hold its output open.
                    loop = asyncio.get_running_loop()
                    loop.call_later(LINGER_S, self._finish, running)

    def _look_whether_ended(self, running: Running) -> None:
        if running.eof and running.code is not None:
            self._finish(running)

    def _finish(self, running: Running) -> None:
        if self.dialogue.is_over:
            return
        for seq in running.seqs:
            self._by_seq.pop(seq, None)
        running.finish(signal_deaths_are_zero=self.dialect.signal_deaths_are_zero)

    def _on_lost(self, reason: str) -> None:
        self._events.end(SessionLost(reason))
        self._wake_all()

    def _wake_all(self) -> None:
        for running in {*self._by_seq.values(), *self._mains.values()}:
            running.wake()
        self._outputs.wake()

    def _save(self) -> None:
        self._memory.save(self._directory)

    def _refuse(self, what: str) -> NoReturn:
        self.check()
        raise UnsupportedError(f"hyperstart has no command that {what}.")


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


def _ignore(answer: Answer) -> None:
    """Nobody asks."""
