"""The methods of contracts/guest-protocol.md: params in, one answer out."""

from __future__ import annotations

import base64
import binascii
import re
import signal

from vcnode.guest.agent import cgroups, identity, probes, process, processes, stats, volumes, watchdog
from vcnode.guest.agent.containers import ContainerSpec
from vcnode.guest.agent.entries import Entry
from vcnode.guest.agent.failures import NOT_IMPLEMENTED, Failure
from vcnode.guest.agent.params import Params, invalid
from vcnode.guest.agent.process import ProcessSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vcnode.guest.agent.containers import Container, Containers
    from vcnode.guest.agent.dialing import Dialer
    from vcnode.guest.agent.execs import Execs
    from vcnode.guest.agent.logs import Feed
    from vcnode.guest.agent.loop import Loop
    from vcnode.guest.agent.mainio import Attachments
    from vcnode.guest.agent.port import Answer, Port
    from vcnode.guest.agent.watchdog import Watchdog

    Method = Callable[[Params, Answer], None]

_ID = re.compile(r"[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?")
_DISK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}")
_SHARED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_SECRET_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LAST_STREAM = (1 << 32) - 1
_MAX_SIZE = 10_000
"""Most rows or columns of a terminal."""
MAX_KNOWN_LOGS = 1024
MAX_SECRETS = 64
MAX_SECRET_CHARS = 96 * 1024
"""Longest content of a secret, in base64."""


def _matching(params: Params, field: str, pattern: re.Pattern[str]) -> str:
    value = params.text(field)
    if not pattern.fullmatch(value):
        raise invalid(params.path(field), f"must match {pattern.pattern}")
    return value


def _signal_number(params: Params) -> int:
    return params.integer("signal", 1, signal.NSIG - 1)


def _known_log(item: Any, path: str) -> tuple[str, tuple[int, int]]:
    if type(item) is not dict:
        raise invalid(path, "must be of type dict")
    known = Params(item, path)
    container_id = _matching(known, "container_id", _ID)
    instance, offset = known.integer("instance", 0, 1 << 62), known.integer("offset", 0, 1 << 62)
    known.done()
    return container_id, (instance, offset)


def _secret(item: Any, path: str) -> tuple[str, int, bytes]:
    if type(item) is not dict:
        raise invalid(path, "must be of type dict")
    secret = Params(item, path)
    name = _matching(secret, "name", _SECRET_NAME)
    mode = secret.integer("mode", 0, 0o777)
    text = secret.text("data", longest=MAX_SECRET_CHARS)
    secret.done()
    try:
        return name, mode, base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{path}.data", "is not base64") from None


def container_spec(params: Params) -> ContainerSpec:
    """Check the params of ``create_container``."""
    root = params.object("root")
    given = [name for name in ("shared_name", "disk_id") if root.has(name)]
    if len(given) != 1:
        raise invalid("root", "must have exactly one of shared_name and disk_id")
    shared_name = _matching(root, "shared_name", _SHARED_NAME) if given == ["shared_name"] else None
    disk_id = _matching(root, "disk_id", _DISK_ID) if given == ["disk_id"] else None
    layer_disk_id = None
    if disk_id is not None and root.has("layer_disk_id"):
        layer_disk_id = _matching(root, "layer_disk_id", _DISK_ID)
        if layer_disk_id == disk_id:
            raise invalid("root.layer_disk_id", "must be another disk than disk_id")
    root.done()
    spec = ContainerSpec(
        container_id=_matching(params, "container_id", _ID),
        shared_name=shared_name,
        disk_id=disk_id,
        layer_disk_id=layer_disk_id,
        readonly=params.flag("readonly", False),
        hostname=identity.hostname(params),
        process=ProcessSpec(params.object("process")),
        limits=cgroups.Limits(params.object("resources")),
        probes=probes.parse(params.object("probes")),
        stop_signal=params.integer("stop_signal", 1, signal.NSIG - 1, signal.SIGTERM.value),
        stop_timeout_s=params.integer("stop_timeout_ms", 0, 3_600_000, 0) / 1000,
        stdin=params.flag("stdin", False),
        tty=params.flag("tty", False),
        secrets=params.array("secrets", _secret, longest=MAX_SECRETS),
        mounts=params.array("mounts", volumes.parse, longest=volumes.MAX_MOUNTS),
    )
    params.done()
    return spec


class Service:
    """Carries out what comes over the port; a `port.Listener`.

    Args:
        loop: Where what takes longer goes on.
        port: For events.
        containers: The containers.
        execs: The processes of ``execute`` and ``copy``.
        dialer: The connections of ``connect``.
        attachments: Those of ``attach``.
        feed: What containers write.
        power_off: Ends the guest; called after the reply to ``shutdown`` is on its way.
        watchdog: Ends it when the host wants it to and says no more.
    """

    def __init__(
        self,
        loop: Loop,
        port: Port,
        containers: Containers,
        execs: Execs,
        dialer: Dialer,
        attachments: Attachments,
        feed: Feed,
        introduction: dict[str, str],
        power_off: Callable[[], None],
        watchdog: Watchdog,
    ) -> None:
        self._loop = loop
        self._port = port
        self._introduction = introduction
        self._containers = containers
        self._execs = execs
        self._feed = feed
        self._power_off = power_off
        self._watchdog = watchdog
        self._dialer = dialer
        self._attachments = attachments
        self._methods: dict[str, Method] = {
            "ping": self._ping,
            "configure": self._configure,
            "set_clock": self._set_clock,
            "set_watchdog": self._set_watchdog,
            "create_container": self._create_container,
            "start_container": self._start_container,
            "signal_container": self._signal_container,
            "pause_container": self._pause_container,
            "resume_container": self._resume_container,
            "update_container": self._update_container,
            "memory": self._memory,
            "list_processes": self._list_processes,
            "delete_container": self._delete_container,
            "list_containers": self._list_containers,
            "follow_logs": self._follow_logs,
            "execute": self._execute,
            "signal_process": self._signal_process,
            "resize_process": self._resize_process,
            "copy": self._copy,
            "connect": self._connect,
            "attach": self._attach,
            "detach": self._detach,
            "shutdown": self._shutdown,
            "stats": self._stats,
        }

    def data(self, stream: int, pieces: list[bytes | memoryview]) -> None:
        """See `port.Listener.data`."""
        if not (self._dialer.data(stream, pieces) or self._attachments.data(stream, pieces)):
            self._execs.data(stream, pieces)

    def eof(self, stream: int) -> None:
        """See `port.Listener.eof`."""
        if not (self._dialer.eof(stream) or self._attachments.eof(stream)):
            self._execs.eof(stream)

    def credit(self, stream: int) -> None:
        """See `port.Listener.credit`."""
        if not (self._dialer.credit(stream) or self._attachments.credit(stream)):
            self._execs.credit(stream)
            self._feed.credit(stream)

    def reset(self, stream: int) -> None:
        """See `port.Listener.reset`."""
        if not (self._dialer.reset(stream) or self._attachments.reset(stream)):
            self._execs.reset(stream)
            self._feed.reset(stream)

    def resume_all(self) -> None:
        """See `port.Listener.resume_all`."""
        self._execs.resume_all()
        self._dialer.resume_all()
        self._feed.push()
        self._attachments.resume_all()

    def end_session(self) -> None:
        """See `port.Listener.end_session`."""
        self._execs.end_session()
        self._dialer.end_session()
        self._feed.end_session()
        self._attachments.end_session()

    def request(self, answer: Answer, method: str, params: dict[str, Any]) -> None:
        """Carry out one request; whatever happens, it is answered."""
        call = self._methods.get(method)
        try:
            if call is None:
                raise Failure(NOT_IMPLEMENTED, f"This agent has no method {method[:64]!r}.")
            call(Params(params), answer)
        except Failure as failure:
            answer.failure(failure)
        except OSError as exc:
            answer.failure(Failure.of(exc, f"carry out {method}"))

    def container_exited(self, container: Container) -> None:
        """Tell the host of the end of a main process."""
        fields = container.status()
        names = ("container_id", "exit_code", "oom_killed", "finished_at_ns", "probe_failure")
        self._port.send_event("container_exited", {name: fields[name] for name in names})

    def health_changed(self, container: Container) -> None:
        """Tell the host that a container has become ready, or is no longer."""
        fields = container.status()
        names = ("container_id", "started", "ready", "probe_failure")
        self._port.send_event("container_health", {name: fields[name] for name in names})

    def _ping(self, params: Params, answer: Answer) -> None:
        params.done()
        answer.result({})

    def _configure(self, params: Params, answer: Answer) -> None:
        wanted = identity.Identity(params)
        identity.apply(wanted)
        if wanted.watchdog is not None:
            self._watchdog.set(wanted.watchdog)
        self._introduction["boot_id"] = identity.boot_id()
        answer.result({})

    def _set_clock(self, params: Params, answer: Answer) -> None:
        time_ns = identity.time_ns(params)
        params.done()
        identity.set_clock(time_ns)
        answer.result({})

    def _set_watchdog(self, params: Params, answer: Answer) -> None:
        setting = watchdog.Setting(params.object("watchdog"))
        params.done()
        self._watchdog.set(setting)
        answer.result({})

    def _create_container(self, params: Params, answer: Answer) -> None:
        self._containers.create(container_spec(params), _done(answer))

    def _start_container(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        params.done()
        self._containers.start(container_id, _told(answer, "pid"))

    def _signal_container(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        number, everyone = _signal_number(params), params.flag("everyone", False)
        params.done()
        self._containers.signal(container_id, number, everyone=everyone)
        answer.result({})

    def _pause_container(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        params.done()
        self._containers.pause(container_id, _done(answer))

    def _resume_container(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        params.done()
        self._containers.resume(container_id)
        answer.result({})

    def _update_container(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        limits = cgroups.Limits(params.object("resources"))
        params.done()
        self._containers.update(container_id, limits)
        answer.result({})

    def _memory(self, params: Params, answer: Answer) -> None:
        params.done()
        answer.result({"available_bytes": cgroups.available_bytes()})

    def _list_processes(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        limit = params.integer("limit", 1, processes.MAX_PROCESSES)
        params.done()
        self._containers.list_processes(container_id, limit, answer.result)

    def _delete_container(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        params.done()
        self._containers.delete(container_id, _done(answer))

    def _list_containers(self, params: Params, answer: Answer) -> None:
        params.done()
        answer.result({"containers": self._containers.states()})

    def _follow_logs(self, params: Params, answer: Answer) -> None:
        stream = params.integer("stream", 1, _LAST_STREAM)
        known = params.array("known", _known_log, longest=MAX_KNOWN_LOGS)
        params.done()
        self._feed.follow(stream, self._containers.logs(), dict(known))
        answer.result({})
        self._feed.push()

    def _execute(self, params: Params, answer: Answer) -> None:
        container_id = params.optional_text("container_id", longest=64)
        spec = ProcessSpec(params.object("process"))
        named = params.object("streams")
        streams = _streams(named)
        terminal = None
        if params.has("tty"):
            size = params.object("tty")
            terminal = (size.integer("rows", 1, _MAX_SIZE), size.integer("columns", 1, _MAX_SIZE))
            size.done()
            if streams[2] is not None:
                raise invalid("streams.stderr", "must be null: a terminal has one output")
        params.done()
        started = _told(answer, "process_id")
        if container_id is None:
            here = Entry.guest()
            self._execs.start(
                lambda: process.Plan(spec, here.root, here.hostname, terminal), here, streams, started
            )
            return
        joined = self._containers.join_entry(container_id)
        self._execs.start(
            lambda: process.Plan(spec, joined.root, joined.hostname, terminal),
            joined,
            streams,
            started,
            self._containers.launcher(container_id),
        )

    def _copy(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        direction, path = params.text("direction"), params.text("path")
        max_bytes = params.integer("max_bytes", 0, 1 << 62)
        streams = _streams(params.object("streams"))
        params.done()
        if direction not in ("in", "out"):
            raise invalid("direction", "must be 'in' or 'out'")
        if not path.startswith("/"):
            raise invalid("path", "must be an absolute path")
        entry = self._containers.files_entry(container_id)
        self._execs.start(
            lambda: process.copy_plan(direction, path, max_bytes),
            entry,
            streams,
            _told(answer, "process_id"),
        )

    def _resize_process(self, params: Params, answer: Answer) -> None:
        process_id = params.integer("process_id", 1, 1 << 62)
        rows, columns = params.integer("rows", 1, _MAX_SIZE), params.integer("columns", 1, _MAX_SIZE)
        params.done()
        if (attached := self._attachments.find(process_id)) is not None:
            attached.io.resize(rows, columns)
        else:
            self._execs.resize(process_id, rows, columns)
        answer.result({})

    def _attach(self, params: Params, answer: Answer) -> None:
        container_id = _matching(params, "container_id", _ID)
        streams = _streams(params.object("streams"))
        params.done()

        def signal_main(number: int) -> None:
            self._containers.signal(container_id, number, everyone=False)

        number = self._attachments.attach(self._containers.main_io(container_id), streams, signal_main)
        answer.result({"process_id": number})
        attached = self._attachments.find(number)
        if attached is not None and attached.input is None and streams[0] is not None:
            self._port.send_reset(streams[0])

    def _detach(self, params: Params, answer: Answer) -> None:
        process_id = params.integer("process_id", 1, 1 << 62)
        params.done()
        if (attached := self._attachments.find(process_id)) is not None:
            attached.detach()
        answer.result({})

    def _connect(self, params: Params, answer: Answer) -> None:
        number = params.integer("port", 1, 65_535)
        named = params.object("streams")
        streams = (named.integer("up", 1, _LAST_STREAM), named.integer("down", 1, _LAST_STREAM))
        named.done()
        params.done()
        self._dialer.connect(number, streams, _done(answer))

    def _signal_process(self, params: Params, answer: Answer) -> None:
        process_id, number = params.integer("process_id", 1, 1 << 62), _signal_number(params)
        params.done()
        if (attached := self._attachments.find(process_id)) is not None:
            attached.signal(number)
        else:
            self._execs.signal(process_id, number)
        answer.result({})

    def _shutdown(self, params: Params, answer: Answer) -> None:
        params.done()
        answer.result({})
        self._power_off()

    def _stats(self, params: Params, answer: Answer) -> None:
        params.done()
        stats.Sample(self._loop, self._containers.groups(), answer.result)


def _streams(named: Params) -> tuple[int | None, int | None, int | None]:
    """The streams of a process; None: /dev/null."""
    streams = (
        named.optional_integer("stdin", 1, _LAST_STREAM),
        named.optional_integer("stdout", 1, _LAST_STREAM),
        named.optional_integer("stderr", 1, _LAST_STREAM),
    )
    named.done()
    return streams


def _done(answer: Answer) -> Callable[[Failure | None], None]:
    """A callback that answers with success (None) or a failure."""

    def done(failure: Failure | None) -> None:
        if failure is None:
            answer.result({})
        else:
            answer.failure(failure)

    return done


def _told(answer: Answer, name: str) -> Callable[[Failure | int], None]:
    """A callback that answers with a number called *name*, or a failure."""

    def told(outcome: Failure | int) -> None:
        if isinstance(outcome, Failure):
            answer.failure(outcome)
        else:
            answer.result({name: outcome})

    return told
