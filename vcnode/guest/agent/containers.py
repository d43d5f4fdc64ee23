"""The containers of this guest.

::

    create           start            main process ends
    ------> created ------> starting ------> running ------> stopped ---+
               ^               |  could not be set up           |       |
               +---------------+--------------------------------+       | start: again on the same root
                               ^----------------------------------------+

``starting`` lasts from the fork until the program runs; to the host it is ``created`` or ``stopped``, as
before. ``running`` may be paused: its processes are frozen. `delete` is possible in every state and kills
first.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from functools import partial

from vcnode.guest.agent import process, signals, spawn
from vcnode.guest.agent.cgroups import ROOT as CGROUP_ROOT
from vcnode.guest.agent.cgroups import Cgroup
from vcnode.guest.agent.entries import Entry
from vcnode.guest.agent.failures import ALREADY_EXISTS, FAILED_PRECONDITION, INTERNAL, NOT_FOUND, Failure
from vcnode.guest.agent.freezer import Freezing
from vcnode.guest.agent.launching import Launcher
from vcnode.guest.agent.logs import END, Feed, Log
from vcnode.guest.agent.loop import IN
from vcnode.guest.agent.mainio import SIZE, MainIo
from vcnode.guest.agent.probes import Exec, Runner, connect
from vcnode.guest.agent.processes import Listing
from vcnode.guest.agent.undo import Undo
from vcnode.guest.agent.volumes import Volumes, find_port
from vcnode.guest.health import Health

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vcnode.guest.agent.cgroups import Limits
    from vcnode.guest.agent.disks import Disks
    from vcnode.guest.agent.loop import Loop, Timer
    from vcnode.guest.agent.mounts import Mounts
    from vcnode.guest.agent.process import ProcessSpec
    from vcnode.guest.agent.spawn import Spawned, Spawner
    from vcnode.guest.agent.volumes import Mount
    from vcnode.guest.health import ProbeSpec

    Done = Callable[[Failure | None], None]
    PlainMount = tuple[str, str, str, int, str]

CREATED, STARTING, RUNNING, STOPPED = "created", "starting", "running", "stopped"
PAUSED = "paused"


class ContainerSpec:
    """What a container is to be; see contracts/guest-protocol.md, ``create_container``."""

    __slots__ = (
        "container_id",
        "disk_id",
        "hostname",
        "layer_disk_id",
        "limits",
        "mounts",
        "probes",
        "process",
        "readonly",
        "secrets",
        "shared_name",
        "stdin",
        "stop_signal",
        "stop_timeout_s",
        "tty",
    )

    def __init__(
        self,
        *,
        container_id: str,
        shared_name: str | None,
        disk_id: str | None,
        layer_disk_id: str | None = None,
        readonly: bool,
        hostname: str,
        process: ProcessSpec,
        limits: Limits,
        probes: dict[str, ProbeSpec],
        stop_signal: int,
        stop_timeout_s: float,
        stdin: bool = False,
        tty: bool = False,
        secrets: tuple[tuple[str, int, bytes], ...] = (),
        mounts: tuple[Mount, ...] = (),
    ) -> None:
        self.mounts = mounts
        """What it mounts besides its root."""
        self.secrets = secrets
        """Name, mode and content of each file of its ``/run/secrets``."""
        self.stdin = stdin
        self.tty = tty
        self.container_id = container_id
        self.shared_name = shared_name
        self.disk_id = disk_id
        self.layer_disk_id = layer_disk_id
        self.readonly = readonly
        self.hostname = hostname
        self.process = process
        self.limits = limits
        self.probes = probes
        self.stop_signal = stop_signal
        self.stop_timeout_s = stop_timeout_s
        """How a container is ended whose probes have failed."""


class Container:
    """One container. Only `Containers` changes it."""

    def __init__(self, spec: ContainerSpec, cgroup: Cgroup, log: Log) -> None:
        self.spec = spec
        self.cgroup = cgroup
        self.state = CREATED
        self.undo = Undo()
        self.main: Spawned | None = None
        self.executed = False
        """Whether a process was executed in its present run."""
        self.launcher: Launcher | None = None
        """Starts what is executed from the second time on."""
        self.health: Health
        """Set as soon as it is made."""
        self.probe_failure: str | None = None
        """Why its probes have ended it."""
        self.grace: Timer | None = None
        """Kills it when its grace is over."""
        self.paused = False
        """Its processes are frozen; only while it is running."""
        self.freezing: Freezing | None = None
        """The request that waits for that."""
        self.ended_by = 0
        """The signal whose effect was brought about by SIGKILL; 0: none."""
        self.exit_code: int | None = None
        self.oom_killed = False
        self.started_at_ns = 0
        self.finished_at_ns: int | None = None
        self.log = log
        """What its main process writes."""
        self.io: MainIo | None = None
        """Of its present run, or its last."""
        self.mounts: tuple[PlainMount, ...] = ()
        """What its main process mounts."""
        self.creating = True
        """Its root is not complete yet."""
        self.stop_waiting: Callable[[], None] | None = None
        """Gives up waiting for its disk, which fails its creation."""
        self.on_started: Callable[[Failure | int], None] | None = None
        """The request that waits for its start."""
        self.start_failure: Failure | None = None
        """Why the main process was not set up; the request is told when the process has ended."""
        self.on_deleted: list[Done] = []
        """The requests that wait for its end, to delete it."""

    def status(self) -> dict[str, Any]:
        """Its entry in the reply of ``list_containers``."""
        running = self.state == RUNNING
        return {
            "container_id": self.spec.container_id,
            "state": self.public_state,
            "pid": self.main.pid if running and self.main else None,
            "exit_code": self.exit_code,
            "oom_killed": self.oom_killed,
            "finished_at_ns": self.finished_at_ns,
            "resources": self.spec.limits.given,
            "started": self.health.started,
            "ready": self.health.ready,
            "probe_failure": self.probe_failure,
        }

    @property
    def public_state(self) -> str:
        """The state as the host knows it."""
        if self.state == STARTING:
            return CREATED if self.exit_code is None else STOPPED
        return PAUSED if self.paused else self.state


class Containers:
    """All containers; every method returns at once, what takes longer is told to the callback it was given.

    Args:
        loop: Where to wait.
        mounts: Prepares roots.
        disks: Finds disks.
        spawner: Makes processes.
        feed: Sends what containers write.
        exited: Called with a container whose main process has ended.
        cgroup_root: Where cgroup v2 is mounted.
        volumes: Reaches what containers mount.
        health_changed: Called with a container whose health is another.
    """

    def __init__(
        self,
        loop: Loop,
        mounts: Mounts,
        disks: Disks,
        spawner: Spawner,
        feed: Feed,
        exited: Callable[[Container], None],
        cgroup_root: str = CGROUP_ROOT,
        *,
        volumes: Volumes | None = None,
        health_changed: Callable[[Container], None] = lambda _: None,
    ) -> None:
        self._volumes = volumes or Volumes(mounts.run, cgroup_root)
        self._loop = loop
        self._mounts = mounts
        self._disks = disks
        self._spawner = spawner
        self._feed = feed
        self._exited = exited
        self._health_changed = health_changed
        self._runner = Runner(loop, spawner)
        self._cgroup_root = cgroup_root
        self._all: dict[str, Container] = {}

    def get(self, container_id: str) -> Container:
        """The container of this id.

        Raises:
            Failure: ``not_found``.
        """
        container = self._all.get(container_id)
        if container is None or container.creating:
            raise Failure(NOT_FOUND, f"There is no container {container_id!r} in this guest.")
        return container

    def states(self) -> list[dict[str, Any]]:
        """The state of each container."""
        return [container.status() for container in self._all.values() if not container.creating]

    def logs(self) -> list[Log]:
        """What each container has written."""
        return [container.log for container in self._all.values()]

    # -- create ------------------------------------------------------------------------------------

    def create(self, spec: ContainerSpec, done: Done) -> None:
        """Make a container's group, mounts and root; on failure nothing of it is left."""
        if spec.container_id in self._all:
            done(Failure(ALREADY_EXISTS, f"The guest has a container {spec.container_id!r} already."))
            return
        cgroup = Cgroup(spec.container_id, self._cgroup_root)
        container = Container(spec, cgroup, Log(spec.container_id, self._feed))
        container.health = self._health_of(container)
        self._all[spec.container_id] = container

        def failed(failure: Failure) -> None:
            self._remove(container)
            done(failure)

        names: dict[str, str] = {}

        def prepare() -> None:
            container.stop_waiting = None
            try:
                self._prepare(container, names)
            except OSError as exc:
                failed(Failure.of(exc, f"make container {spec.container_id!r}"))
            except Failure as failure:
                failed(failure)
            else:
                container.creating = False
                done(None)

        mounted = dict.fromkeys(mount.disk_id for mount in spec.mounts)
        every = (*reversed(mounted), spec.layer_disk_id, spec.disk_id)
        wanted = [(disk_id, True) for disk_id in every if disk_id is not None]
        wanted += [(mount.port, False) for mount in spec.mounts if mount.port is not None]

        def wait_for_next() -> None:
            if not wanted:
                prepare()
                return
            wanted_id, is_disk = wanted.pop()

            def found(name: str) -> None:
                names[wanted_id] = name
                wait_for_next()

            if is_disk:
                stop_waiting = self._disks.when_there(wanted_id, found, failed)
            else:
                look = partial(find_port, wanted_id)
                stop_waiting = self._disks.when(look, f"port {wanted_id!r}", found, failed)
            if stop_waiting is not None:
                container.stop_waiting = stop_waiting

        wait_for_next()

    def _prepare(self, container: Container, devices: dict[str, str]) -> None:
        self._prepare_root(container, devices)
        container.mounts = tuple(self._source(container, mount, devices) for mount in container.spec.mounts)

    def _source(self, container: Container, mount: Mount, devices: dict[str, str]) -> PlainMount:
        """See that what is to be mounted is there; gives it as `Entry.main` wants it."""
        source = ""
        if mount.shared_name is not None:
            source = self._mounts.shared(mount.shared_name)
        elif mount.fs_tag is not None:
            source = self._volumes.virtio_fs(mount.fs_tag)
        elif mount.port is not None:
            source = devices[mount.port]
            self._volumes.let_use(source)
        elif mount.disk_id is not None:
            disk_id, source = mount.disk_id, self._disks.path(mount.disk_id)
            container.undo.push(f"release disk {disk_id}", partial(self._disks.release, disk_id))
            self._disks.acquire(disk_id, devices[disk_id], writable=mount.writable, fs=mount.fs)
        return source, mount.path, mount.destination, mount.flags, mount.data

    def _prepare_root(self, container: Container, disks: dict[str, str]) -> None:
        spec, undo = container.spec, container.undo
        undo.push(f"remove {container.cgroup.path}", container.cgroup.remove)
        container.cgroup.create(spec.limits.files)
        if spec.disk_id is None:
            self._mounts.make_container(spec.container_id, undo)
            self._mounts.bind_shared(spec.container_id, spec.shared_name or "")
            self._mounts.keep_secrets(spec.container_id, spec.secrets, undo)
            return
        for disk_id in (spec.disk_id, spec.layer_disk_id):
            if disk_id is not None:
                undo.push(f"release disk {disk_id}", partial(self._disks.release, disk_id))
                self._disks.acquire(disk_id, disks[disk_id], writable=disk_id == spec.layer_disk_id)
        layer = spec.layer_disk_id and self._disks.path(spec.layer_disk_id)
        self._mounts.make_container(spec.container_id, undo)
        self._mounts.overlay(spec.container_id, self._disks.path(spec.disk_id), layer)
        self._mounts.keep_secrets(spec.container_id, spec.secrets, undo)

    # -- start -------------------------------------------------------------------------------------

    def start(self, container_id: str, started: Callable[[Failure | int], None]) -> None:
        """Start the main process; *started* gets its pid once the program runs, or why it does not.

        Raises:
            Failure: ``not_found``, ``failed_precondition``, ``internal``.
        """
        container = self.get(container_id)
        if container.state not in (CREATED, STOPPED) or container.on_deleted:
            state = container.state if not container.on_deleted else "being deleted"
            raise Failure(FAILED_PRECONDITION, f"Container {container_id!r} is {state}.")
        container.executed = False
        container.main = self._spawn_main(container)
        container.started_at_ns = time.time_ns()
        container.state = STARTING
        container.on_started, container.start_failure = started, None
        self._loop.watch(container.main.status_fd, IN, lambda _: self._on_status(container))
        self._loop.watch(container.main.pidfd, IN, lambda _: self._on_end(container))

    def _spawn_main(self, container: Container) -> Spawned:
        """Fork; afterwards the agent holds the reading ends of the output pipes only."""
        spec = container.spec
        io = MainIo(self._loop, container.log, stdin=spec.stdin, tty=spec.tty)
        opened: list[int] = []
        try:
            opened += io.open()
            procs_fd = container.cgroup.open_procs()
            opened.append(procs_fd)
            entry = Entry.main(
                self._mounts.root(spec.container_id),
                readonly=spec.readonly,
                hostname=spec.hostname,
                cgroup_procs_fd=procs_fd,
                secrets=self._mounts.secrets(spec.container_id) if spec.secrets else "",
                mounts=container.mounts,
            )
            stdio = (opened[0], opened[1], opened[2])
            plan = process.Plan(spec.process, entry.root, spec.hostname, SIZE if spec.tty else None)
            spawned = self._spawner.spawn(plan, stdio, entry)
        except (OSError, Failure) as exc:
            io.close()
            if isinstance(exc, Failure):
                raise
            raise Failure.of(exc, f"start container {spec.container_id!r}") from exc
        finally:
            for fd in opened:
                os.close(fd)
        io.begin()
        container.io = io
        return spawned

    def _on_status(self, container: Container) -> None:
        if container.state != STARTING or container.main is None:
            return
        outcome = spawn.read_status(container.main.status_fd)
        if outcome is False:
            return
        self._close_status(container)
        if outcome is True:
            outcome = self._take_terminal(container)
        if outcome is True:
            container.state = RUNNING
            container.exit_code, container.oom_killed, container.finished_at_ns = None, False, None
            container.ended_by = 0
            container.probe_failure = None
            container.health.start()
            self._answer_start(container, container.main.pid)
            return
        # The child is ending, and until it has, its mounts are in use: `_on_end` tells the request.
        container.start_failure = outcome if isinstance(outcome, Failure) else None

    def _take_terminal(self, container: Container) -> Failure | bool:
        """Take over the terminal of a main process that runs; one that came without it is ended."""
        if container.io is None or container.main is None:
            return True
        try:
            container.io.take_terminal()
        except Failure as failure:
            _signal_pidfd(container.main.pidfd, signal.SIGKILL)
            return failure
        return True

    def _answer_start(self, container: Container, outcome: Failure | int) -> None:
        container.on_started, started = None, container.on_started
        if started is not None:
            started(outcome)

    def _close_status(self, container: Container) -> None:
        if container.main is not None and container.main.status_fd >= 0:
            self._loop.unwatch(container.main.status_fd)
            os.close(container.main.status_fd)
            container.main.status_fd = -1

    # -- end ---------------------------------------------------------------------------------------

    def _on_end(self, container: Container) -> None:
        """The main process ended, and with it, being process 1 of its namespace, every other one."""
        main = container.main
        if main is None:
            return
        if container.state == STARTING and main.status_fd >= 0:
            # Both are ready at once when the program was short: hear first whether it ran at all.
            self._on_status(container)
        if (launcher := container.launcher) is not None:
            self._loop.unwatch(main.pidfd)
            self._thaw(container, "The container has ended.")

            def launcher_ended() -> None:
                container.launcher = None
                self._loop.watch(main.pidfd, IN, lambda _: self._on_end(container))

            launcher.end(launcher_ended)
            return
        pid, status = os.waitpid(main.pid, os.WNOHANG)
        if pid == 0:
            return
        self._close_status(container)
        self._loop.unwatch(main.pidfd)
        os.close(main.pidfd)
        container.main = None
        container.health.stop()
        if container.grace is not None:
            container.grace.cancel()
        self._thaw(container, "The container has ended.")
        if container.io is not None:
            container.io.drain()
        oom_killed = container.cgroup.oom_killed()  # asked here, where no start waits for the answer
        if container.state == RUNNING:
            container.log.add(END, b"")
            container.exit_code = process.exit_code(status)
            if container.ended_by and container.exit_code == 128 + signal.SIGKILL:
                container.exit_code = 128 + container.ended_by
            container.oom_killed = oom_killed and container.exit_code != 0
            container.finished_at_ns = time.time_ns()
            container.state = STOPPED
            if container.io is not None:
                container.io.ended(container.exit_code)
            self._exited(container)
        else:
            container.state = CREATED if container.exit_code is None else STOPPED
            if container.io is not None:
                container.io.close()
            unexplained = Failure(INTERNAL, "The main process ended before it was set up.")
            self._answer_start(container, container.start_failure or unexplained)
        self._finish_delete(container)

    def signal(self, container_id: str, number: int, *, everyone: bool) -> None:
        """Signal the main process, or every process; nothing when it does not run.

        A signal that ends any other process ends the main process as well, although the kernel protects
        process 1 of a namespace from those that it has no handler for: see `signals.would_end`.

        Raises:
            Failure: ``not_found``.
        """
        container = self.get(container_id)
        if container.main is None or container.state != RUNNING:
            return
        if signals.would_end(container.main.pid, number):
            container.ended_by = number
            _signal_pidfd(container.main.pidfd, signal.SIGKILL)
        elif not everyone:
            _signal_pidfd(container.main.pidfd, number)
        elif number == signal.SIGKILL:
            container.cgroup.kill()
        else:
            for pid in _own_pids(container):
                _signal_pid(pid, number)

    # -- pause -------------------------------------------------------------------------------------

    def pause(self, container_id: str, done: Done) -> None:
        """Freeze every process of a running container; *done* is called once they stand still.

        Raises:
            Failure: ``not_found``, ``failed_precondition``.
        """
        container = self.get(container_id)
        if container.state != RUNNING or container.freezing is not None:
            state = "being paused" if container.freezing else container.public_state
            raise Failure(FAILED_PRECONDITION, f"Container {container_id!r} is {state}, not running.")
        if container.paused:
            done(None)
            return

        def frozen(failure: Failure | None) -> None:
            container.freezing = None
            container.paused = failure is None
            if failure is not None:
                container.health.resume()
            done(failure)

        container.health.pause()

        freezing = Freezing(self._loop, container.cgroup, frozen)
        if freezing.pending:
            container.freezing = freezing

    def resume(self, container_id: str) -> None:
        """Let a paused container go on; nothing when it is not paused.

        Raises:
            Failure: ``not_found``.
        """
        self._thaw(self.get(container_id), "The container was resumed meanwhile.")

    def _thaw(self, container: Container, reason: str) -> None:
        if container.freezing is not None:
            container.freezing.cancel(reason)
        if container.paused:
            container.cgroup.thaw()
            container.paused = False
            container.health.resume()

    # -- limits ------------------------------------------------------------------------------------

    def update(self, container_id: str, limits: Limits) -> None:
        """Give a container these limits, and no others.

        Raises:
            Failure: ``not_found``, ``failed_precondition``, ``internal``; its limits are as before.
        """
        container = self.get(container_id)
        try:
            container.cgroup.update(limits.files)
        except OSError as exc:
            raise Failure.of(exc, f"change the limits of container {container_id!r}") from exc
        container.spec.limits = limits

    # -- health ------------------------------------------------------------------------------------

    def _health_of(self, container: Container) -> Health:
        return Health(
            container.spec.probes,
            timers=self._loop,
            now=time.monotonic,
            attempt=lambda spec, done: self._try(container, spec, done),
            changed=lambda: self._health_changed(container),
            failed=lambda why: self._unhealthy(container, why),
        )

    def _try(
        self, container: Container, spec: ProbeSpec, done: Callable[[str | None], None]
    ) -> Callable[[], None]:
        """Begin one attempt of a probe."""
        action = spec.action
        if not isinstance(action, Exec):
            return connect(self._loop, action, done)
        try:
            entry = self.join_entry(container.spec.container_id)
        except Failure as failure:
            done(failure.message)
            return lambda: None
        return self._runner.run(container.spec.process, action.args, entry, done)

    def _unhealthy(self, container: Container, why: str) -> None:
        """End a container whose probe has failed, as ``container.stop`` would."""
        container.probe_failure = why
        self._health_changed(container)
        self._end(container, container.spec.stop_timeout_s)

    def _end(self, container: Container, grace_s: float) -> None:
        """Send the stop signal, and SIGKILL when the grace is over."""
        container_id = container.spec.container_id
        if grace_s > 0:
            self.signal(container_id, container.spec.stop_signal, everyone=False)
        if container.main is not None:
            container.grace = self._loop.call_later(
                grace_s,
                lambda: self.signal(container_id, signal.SIGKILL, everyone=True),
            )

    def groups(self) -> dict[str, Cgroup]:
        """The cgroup of each container, by its id."""
        return {cid: container.cgroup for cid, container in self._all.items() if not container.creating}

    # -- processes ---------------------------------------------------------------------------------

    def list_processes(self, container_id: str, limit: int, done: Callable[[dict[str, Any]], None]) -> None:
        """Describe the processes of a container; *done* gets the result of ``list_processes``.

        Raises:
            Failure: ``not_found``.
        """
        container = self.get(container_id)
        Listing(
            self._loop,
            _own_pids(container),
            self._mounts.root(container_id),
            limit,
            done,
            not_before_ns=container.started_at_ns,
        )

    # -- delete ------------------------------------------------------------------------------------

    def delete(self, container_id: str, done: Done) -> None:
        """Kill what runs, then unmount and remove everything. Succeeds when there is no such container."""
        container = self._all.get(container_id)
        if container is None:
            done(None)
            return
        if container.stop_waiting is not None:
            container.stop_waiting()
            done(None)
            return
        container.on_deleted.append(done)
        if container.main is not None:
            # `_on_end` goes on. The status pipe says nothing after this, so a start that waits ends here.
            _signal_pidfd(container.main.pidfd, signal.SIGKILL)
            return
        self._finish_delete(container)

    def _finish_delete(self, container: Container) -> None:
        waiting, container.on_deleted = container.on_deleted, []
        if not waiting:
            return
        problems = self._remove(container)
        name = container.spec.container_id
        failure = Failure(INTERNAL, f"Container {name!r}: {'; '.join(problems)}.") if problems else None
        if not self._all:
            self._spawner.fork_ahead()  # before the answer: after it, this guest may become a template
        for done in waiting:
            done(failure)

    def _remove(self, container: Container) -> list[str]:
        """Take everything back; the container is forgotten unless something could not be."""
        problems = container.undo.run()
        if problems:
            container.creating = False
        else:
            del self._all[container.spec.container_id]
            self._feed.forget(container.log)
        return problems

    def kill_all(self) -> None:
        """Send SIGKILL to every container: the guest goes down."""
        for container in self._all.values():
            if container.main is not None:
                _signal_pidfd(container.main.pidfd, signal.SIGKILL)

    def end_all(self, grace_s: float) -> None:
        """End every container as ``container.stop`` would, with no more grace than *grace_s*."""
        for container in self._all.values():
            if container.main is None:
                continue
            if container.state != RUNNING:
                _signal_pidfd(container.main.pidfd, signal.SIGKILL)
                continue
            self._end(container, min(grace_s, container.spec.stop_timeout_s))
            self._thaw(container, "The guest ends.")  # so that it can hear

    @property
    def any_runs(self) -> bool:
        """Whether some container has a main process."""
        return any(container.main is not None for container in self._all.values())

    # -- execute -----------------------------------------------------------------------------------

    def join_entry(self, container_id: str) -> Entry:
        """How a further process gets into a running container. Its ``fds[0]`` is the caller's to close.

        Raises:
            Failure: ``not_found``, ``failed_precondition``, ``internal``.
        """
        container = self.get(container_id)
        main = container.main
        if container.state != RUNNING or main is None or container.paused or container.freezing:
            raise Failure(
                FAILED_PRECONDITION, f"Container {container_id!r} is {container.public_state}, not running."
            )
        try:
            procs_fd = container.cgroup.open_procs()
        except OSError as exc:
            raise Failure.of(exc, f"join container {container_id!r}") from exc
        return Entry.join(main.pid, main.pidfd, hostname=container.spec.hostname, cgroup_procs_fd=procs_fd)

    def launcher(self, container_id: str) -> Launcher | None:
        """The launcher of a running container, made the second time: many a container has one exec."""
        container = self.get(container_id)
        launcher = container.launcher
        if container.main is None or not container.executed or (launcher is not None and launcher.pid):
            container.executed = True
            return launcher
        opened: list[int] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            spec = container.spec.process.of_launcher()
            plan = process.Plan(spec, f"/proc/{container.main.pid}/root", "")
            opened.append(container.cgroup.open_procs())
            opened.append(os.open(f"{self._cgroup_root}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
            opened.append(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
            entry = Entry.launch(container.main.pidfd, cgroup_procs_fd=opened[0], home_fd=opened[1])
            spawned = self._spawner.spawn(plan, (theirs.fileno(), opened[2], opened[2]), entry)
        except (OSError, Failure):
            ours.close()
            return None
        finally:
            theirs.close()
            for fd in opened:
                os.close(fd)
        container.launcher = Launcher(self._loop, ours, spawned, plan.privileges)
        return container.launcher

    def main_io(self, container_id: str) -> MainIo:
        """The streams of a container's main process.

        Raises:
            Failure: ``not_found``, ``failed_precondition``.
        """
        container = self.get(container_id)
        if container.state != RUNNING or container.io is None:
            raise Failure(
                FAILED_PRECONDITION, f"Container {container_id!r} is {container.public_state}, not running."
            )
        return container.io

    def files_entry(self, container_id: str) -> Entry:
        """How to get at a container's files: inside it while it runs, in its bare root otherwise.

        Raises:
            Failure: ``not_found``, ``internal``.
        """
        container = self.get(container_id)
        if container.state == RUNNING and not container.paused and not container.freezing:
            return self.join_entry(container_id)
        return Entry.files(self._mounts.root(container_id))


def _own_pids(container: Container) -> list[int]:
    """The processes in its group but the launcher, which may be on its way through."""
    launcher = container.launcher.pid if container.launcher is not None else 0
    return [pid for pid in container.cgroup.pids() if pid != launcher]


def _signal_pidfd(pidfd: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return  # it has ended and only waits to be reaped


def _signal_pid(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
