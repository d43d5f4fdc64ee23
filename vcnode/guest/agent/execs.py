"""Processes of ``execute`` and their streams.

Each leads a session of its own and belongs to the protocol session that started it. The agent never blocks
on one: its pipes are non-blocking, output is read only as far as the host has granted credit, and input is
bounded by the credit that the agent has granted.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import stat
import termios
from collections import deque
from itertools import islice

from vcnode.guest.agent import process, spawn, ttys
from vcnode.guest.agent.child import give_pipes_to
from vcnode.guest.agent.failures import INTERNAL, Failure
from vcnode.guest.agent.loop import IN, OUT
from vcnode.guest.streams import BULK_FROM
from vcnode.guest.wire import MAX_PAYLOAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vcnode.guest.agent.entries import Entry
    from vcnode.guest.agent.launching import Launcher
    from vcnode.guest.agent.loop import Loop
    from vcnode.guest.agent.port import Port
    from vcnode.guest.agent.process import Plan
    from vcnode.guest.agent.spawn import Spawned, Spawner

_READ_BYTES = 32 * 1024
_PIPE_BYTES = 1 << 20
"""Size of a pipe through which a lot goes: more at once, and fewer turns between process and agent."""
_MOST_PIECES = 64
"""Of what waits for a process, as many pieces are written at once."""
_KILL_ROUNDS = 16
HANG_UP_S = 0.2
"""Seconds in which a terminal hangs up after its session's leader has ended, far more than it takes."""


class Output:
    """One output pipe on its way to the host."""

    def __init__(
        self,
        loop: Loop,
        port: Port,
        stream: int,
        fd: int,
        finished: Callable[[], None],
        *,
        terminal: bool = False,
    ) -> None:
        self._terminal = terminal
        self.stream = stream
        self._loop = loop
        self._port = port
        self._fd = fd
        self._finished = finished
        self._left: int | None = None
        self._watched = False
        self._flows: bool | None = None if not terminal and stat.S_ISFIFO(os.fstat(fd).st_mode) else False
        """Whether pages are sent from the pipe itself; None: not yet, for it has not held much."""

    @property
    def is_open(self) -> bool:
        """Whether more may come."""
        return self._fd >= 0

    def resume(self) -> None:
        """Read as soon as there is something, if the host takes it. To be called whenever that may be so."""
        wanted = self.is_open and self._room() > 0
        if wanted and not self._watched:
            self._loop.watch(self._fd, IN, self._on_ready)
        elif not wanted and self._watched:
            # A pipe whose writers are gone is always ready: it must not be watched while it cannot be read.
            self._loop.unwatch(self._fd)
        self._watched = wanted

    def _room(self) -> int:
        room = min(self._port.room(self.stream), _READ_BYTES)
        return room if self._left is None else min(room, self._left)

    def _on_ready(self, _events: int) -> None:
        if (room := self._room()) > 0:
            if self._flows and self._send_pages():
                return
            try:
                data = os.read(self._fd, room)
            except BlockingIOError:
                return
            except OSError:
                data = b""  # a terminal whose last process has gone, a connection that was cut
            if not data:
                self.finish()
                return
            if self._flows is None and len(data) == _READ_BYTES:
                self._flows = True
                widen(self._fd)
            self._port.send_data(self.stream, data)
            self._sent(len(data))
            return
        self.resume()

    def _send_pages(self) -> bool:
        """Send what the pipe holds without reading it; False when that is too little to be worth it."""
        held = _readable(self._fd)
        if self._left is not None:
            held = min(held, self._left)
        if held < _READ_BYTES or not self._port.takes_pipes:
            return False
        if count := self._port.send_pipe(self.stream, self._fd, held):
            self._sent(count)
        else:
            # Goes on when there is room: the pipe is ready all the time.
            self._loop.unwatch(self._fd)
            self._watched = False
        return True

    def _sent(self, count: int) -> None:
        if self._left is not None:
            self._left -= count
            if not self._left:
                self.finish()
                return
        self.resume()

    def process_ended(self) -> None:
        """Send what is in the pipe by now, and no more: others may hold it open and go on writing."""
        if not self.is_open:
            return
        if self._terminal:
            # The kernel hangs up when the session's leader has ended: what was written is read to its end.
            self._loop.call_later(HANG_UP_S, self._give_up)
            return
        self._left = _readable(self._fd)
        if self._left:
            self.resume()
        else:
            self.finish()

    def _give_up(self) -> None:
        """End a terminal that did not hang up, for its process had let go of it; once all of it is read."""
        if not self.is_open:
            return
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if poll.poll(0):
            self._loop.call_later(HANG_UP_S, self._give_up)
        else:
            self.finish()

    @property
    def fd(self) -> int:
        """The descriptor; -1 when closed."""
        return self._fd

    def finish(self) -> None:
        """End the stream. Idempotent."""
        if self.is_open:
            self.close()
            self._port.send_eof(self.stream)
            self._finished()

    def close(self) -> None:
        """Let go of the pipe, silently. Idempotent."""
        if self.is_open:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._watched = False


class Input:
    """The input pipe: what the host sent and the process has not read yet waits here, at most one window."""

    def __init__(
        self,
        loop: Loop,
        port: Port,
        stream: int,
        fd: int,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self._ended = ended
        self.stream = stream
        self._loop = loop
        self._port = port
        self._fd = fd
        self._pending: deque[bytes | bytearray | memoryview] = deque()
        self._wide = not stat.S_ISFIFO(os.fstat(fd).st_mode)
        self._eof = False
        self._watched = False

    @property
    def fd(self) -> int:
        """The descriptor; -1 when closed."""
        return self._fd

    @property
    def is_open(self) -> bool:
        """Whether the process can still be written to."""
        return self._fd >= 0

    def data(self, pieces: list[bytes | memoryview]) -> None:
        """The host sent these bytes; views may be written over after this call."""
        if not self.is_open:
            return
        if not self._wide and sum(map(len, pieces)) >= MAX_PAYLOAD:
            self._wide = True
            widen(self._fd)
        rest: Iterable[bytes | bytearray | memoryview] = pieces
        if not self._pending:
            rest = _after(pieces, self._give(pieces))
        if self.is_open:
            for piece in rest:
                self._keep(piece)
            self._settle()

    def _keep(self, data: bytes | bytearray | memoryview) -> None:
        if len(data) >= BULK_FROM:
            self._pending.append(bytes(data))
        elif self._pending and type(last := self._pending[-1]) is bytearray:
            last += data  # many small pieces must not take more memory than they hold
        else:
            self._pending.append(bytearray(data))

    def _give(self, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """Have the process get as many bytes as its pipe takes; returns how many that is."""
        try:
            count = os.writev(self._fd, pieces)
        except BlockingIOError:
            return 0  # goes on when the process has read
        except OSError:
            self.close()  # nobody reads it any more
            return 0
        self._port.consumed(self.stream, count)
        return count

    def eof(self) -> None:
        """The host will send no more."""
        self._eof = True
        self._settle()

    def _on_ready(self, _events: int) -> None:
        while self._pending and (count := self._give(tuple(islice(self._pending, _MOST_PIECES)))):
            self._pending = deque(_after(self._pending, count))
        self._settle()

    def _settle(self) -> None:
        """Wait for the process to read while something is left for it; end its input when nothing comes."""
        if not self.is_open:
            return
        if not self._pending and self._eof:
            self.close()
        elif bool(self._pending) != self._watched:
            self._watched = not self._watched
            if self._watched:
                self._loop.watch(self._fd, OUT, self._on_ready)
            else:
                self._loop.unwatch(self._fd)

    def close(self) -> None:
        """Let go of the pipe and tell the host, unless it has finished itself. Idempotent."""
        if self.is_open:
            self._loop.unwatch(self._fd)
            if self._ended is not None:
                self._ended()
            os.close(self._fd)
            self._fd = -1
            self._pending.clear()
            self._port.send_reset(self.stream)


class Exec:
    """One process of ``execute``."""

    def __init__(
        self, process_id: int, spawned: Spawned | None, started: Callable[[Failure | None], None]
    ) -> None:
        self.process_id = process_id
        self.spawned = spawned
        """None: a launcher has not answered yet."""
        self.started: Callable[[Failure | None], None] | None = started
        self.failure: Failure | None = None
        self.running = False
        self.exit_code: int | None = None
        self.input: Input | None = None
        self.outputs: list[Output] = []
        self.terminal: tuple[socket.socket, int | None, int | None] | None = None
        """Where its terminal is to come from, and the streams that it is for; None once it has come."""
        self.has_terminal = False


class Execs:
    """All processes of the present protocol session, and those of earlier ones that are still dying."""

    def __init__(self, loop: Loop, port: Port, spawner: Spawner) -> None:
        self._loop = loop
        self._port = port
        self._spawner = spawner
        self._last_id = 0
        self._all: dict[int, Exec] = {}
        self._dying: set[Exec] = set()
        self._by_stream: dict[int, Exec] = {}

    def start(
        self,
        make_plan: Callable[[], Plan],
        entry: Entry,
        streams: tuple[int | None, int | None, int | None],
        started: Callable[[Failure | int], None],
        launcher: Launcher | None = None,
    ) -> None:
        """Start a process; *started* gets its id once its program runs, or why it does not.

        Args:
            make_plan: Makes what is to run. On a terminal there is no stderr, and must be no stream for it.
            entry: Where; the descriptors that are its own are closed here.
            streams: Of stdin, stdout and stderr; None: /dev/null.
            started: Called once.
            launcher: That of the container.

        Raises:
            Failure: ``internal``, ``invalid_argument`` (a stream that cannot be opened); nothing is left.
        """
        ours: list[int | None] = [None, None, None]
        theirs: list[int] = []
        opened: list[int] = []
        terminal: socket.socket | None = None
        try:
            plan = make_plan()
            if plan.terminal is not None:
                terminal, their_socket = socket.socketpair()
                terminal.setblocking(False)
                theirs.append(their_socket.detach())
            for number, stream in enumerate(streams):
                if terminal is None:
                    their_end, ours[number] = _pipe_for(number, stream)
                    theirs.append(their_end)
                if stream is not None:
                    self._port.open_stream(stream, sending=number > 0)
                    opened.append(stream)
            stdio = (theirs[0], theirs[0], theirs[0]) if terminal else (theirs[0], theirs[1], theirs[2])
            found = Exec(self.new_id(), None, started=lambda _: None)
            pending = launcher is not None and self._launch(found, launcher, plan, stdio, entry)
            if not pending:
                found.spawned = self._spawner.spawn(plan, stdio, entry)
        except (OSError, Failure) as exc:
            entry.close()
            for stream in opened:
                self._port.forget_stream(stream)
            for fd in ours:
                if fd is not None:
                    os.close(fd)
            if terminal is not None:
                terminal.close()
            _close(theirs)
            if isinstance(exc, Failure):
                raise
            raise entry.refusal(exc) from exc
        if not pending:
            entry.close()
            _close(theirs)
        if terminal is not None:
            found.terminal = (terminal, streams[0], streams[1])
            found.has_terminal = True
            for stream in opened:
                self._by_stream[stream] = found
        self._add(found, streams, ours, started)

    def _launch(
        self, found: Exec, launcher: Launcher, plan: Plan, stdio: tuple[int, int, int], entry: Entry
    ) -> bool:
        """Have a launcher start it; False when that does not do such a thing. Closes what is lent, later."""

        def begun(spawned: Spawned | None) -> None:
            try:
                found.spawned = spawned or self._spawner.spawn(plan, stdio, entry)
            except Failure as failure:
                found.exit_code = -1
                self._dying.discard(found)
                if self._all.get(found.process_id) is found:
                    self._drop(found, forget_streams=True)
                    self._answer(found, failure)
                return
            finally:
                entry.close()
                _close(stdio)
            if found in self._dying:
                signal_session(found.spawned, signal.SIGKILL)
            if spawned is None:
                self._watch(found, found.spawned)
            else:
                self._runs(found)

        def ended(status: int) -> None:
            if found.spawned is not None:
                self._ended(found, found.spawned, status)

        give_pipes_to(plan.identity.uid, stdio)
        return launcher.launch(plan, stdio, begun, ended)

    def new_id(self) -> int:
        """A process id that was not used in this session."""
        self._last_id += 1
        return self._last_id

    def _add(
        self,
        found: Exec,
        streams: tuple[int | None, int | None, int | None],
        fds: list[int | None],
        started: Callable[[Failure | int], None],
    ) -> None:
        def answer(failure: Failure | None) -> None:
            started(failure or found.process_id)

        found.started = answer
        self._all[found.process_id] = found
        for number, (stream, fd) in enumerate(zip(streams, fds, strict=True)):
            if stream is None or fd is None:
                continue
            self._by_stream[stream] = found
            if number == 0:
                found.input = Input(self._loop, self._port, stream, fd)
            else:
                output = Output(self._loop, self._port, stream, fd, lambda: self._maybe_finish(found))
                found.outputs.append(output)
        if found.spawned is not None:
            self._watch(found, found.spawned)

    def _watch(self, found: Exec, spawned: Spawned) -> None:
        self._loop.watch(spawned.status_fd, IN, lambda _: self._on_status(found, spawned))
        self._loop.watch(spawned.pidfd, IN, lambda _: self._on_end(found, spawned))

    # -- life --------------------------------------------------------------------------------------

    def _on_status(self, found: Exec, spawned: Spawned) -> None:
        if spawned.status_fd < 0:
            return
        outcome = spawn.read_status(spawned.status_fd)
        if outcome is False:
            return
        self._close_status(spawned)
        if isinstance(outcome, Failure):
            found.failure = outcome  # told when the process has ended
            return
        if found.terminal is not None and not self._take_terminal(found, spawned):
            return
        self._runs(found)

    def _runs(self, found: Exec) -> None:
        found.running = True
        self._answer(found, None)
        for output in found.outputs:
            output.resume()

    def _take_terminal(self, found: Exec, spawned: Spawned) -> bool:
        """Connect the streams with the terminal that the child has handed over."""
        if found.terminal is None:
            return True
        (sock, stdin, stdout), found.terminal = found.terminal, None
        try:
            with sock:
                fd = ttys.receive(sock)
        except Failure as failure:
            found.failure = failure
            _quietly(signal.pidfd_send_signal, spawned.pidfd, signal.SIGKILL)
            return False
        if stdin is not None:
            found.input = Input(self._loop, self._port, stdin, os.dup(fd))
            os.set_blocking(found.input.fd, False)
        if stdout is None:
            os.close(fd)
            return True

        def finished() -> None:
            self._maybe_finish(found)

        found.outputs.append(Output(self._loop, self._port, stdout, fd, finished, terminal=True))
        return True

    def resize(self, process_id: int, rows: int, columns: int) -> None:
        """Set the size of a process's terminal; nothing when it has none, or has ended."""
        found = self._all.get(process_id)
        if found is not None and found.outputs and found.outputs[0].is_open and found.has_terminal:
            ttys.set_size(found.outputs[0].fd, rows, columns)

    def _answer(self, found: Exec, failure: Failure | None) -> None:
        found.started, started = None, found.started
        if started is not None:
            started(failure)

    def _close_status(self, spawned: Spawned) -> None:
        if spawned.status_fd >= 0:
            self._loop.unwatch(spawned.status_fd)
            os.close(spawned.status_fd)
            spawned.status_fd = -1

    def _on_end(self, found: Exec, spawned: Spawned) -> None:
        if found.exit_code is not None:
            return
        # A short program: hear first that it ran, the reply comes before the exit.
        self._on_status(found, spawned)
        pid, status = os.waitpid(spawned.pid, os.WNOHANG)
        if pid == 0:
            return
        self._close_status(spawned)
        self._loop.unwatch(spawned.pidfd)
        self._ended(found, spawned, status)

    def _ended(self, found: Exec, spawned: Spawned, status: int) -> None:
        """It has been reaped."""
        found.exit_code = process.exit_code(status)
        os.close(spawned.pidfd)
        if found in self._dying:
            self._dying.discard(found)
        elif found.running:
            for output in found.outputs:
                output.process_ended()
            self._maybe_finish(found)
        else:
            self._drop(found, forget_streams=True)
            unexplained = Failure(INTERNAL, "The process ended before it was set up.")
            self._answer(found, found.failure or unexplained)

    def _maybe_finish(self, found: Exec) -> None:
        """Tell of the end once there is nothing more to send."""
        if found.exit_code is None or any(output.is_open for output in found.outputs):
            return
        if self._all.get(found.process_id) is not found:
            return
        self._drop(found, forget_streams=False)
        self._port.send_event(
            "process_exited", {"process_id": found.process_id, "exit_code": found.exit_code}
        )

    def _drop(self, found: Exec, *, forget_streams: bool) -> None:
        """Forget a process and let go of its pipes."""
        del self._all[found.process_id]
        if found.terminal is not None:
            sock, *unused = found.terminal
            found.terminal = None
            sock.close()
            for stream in unused:
                if stream is not None:
                    self._by_stream.pop(stream, None)
                    self._port.forget_stream(stream)
        ends: list[Input | Output] = [*found.outputs]
        if found.input is not None:
            ends.append(found.input)
        for end in ends:
            self._by_stream.pop(end.stream, None)
            if forget_streams:
                self._port.forget_stream(end.stream)
            end.close()

    # -- what the host sends -----------------------------------------------------------------------

    def data(self, stream: int, pieces: list[bytes | memoryview]) -> None:
        """Bytes for an input."""
        found = self._by_stream.get(stream)
        if found is not None and found.input is not None:
            found.input.data(pieces)

    def eof(self, stream: int) -> None:
        """End of an input."""
        found = self._by_stream.get(stream)
        if found is not None and found.input is not None:
            found.input.eof()

    def credit(self, stream: int) -> None:
        """An output may go on."""
        if (found := self._by_stream.get(stream)) is not None and found.running:
            for output in found.outputs:
                output.resume()

    def reset(self, stream: int) -> None:
        """Nobody wants this output any more; who writes to it gets SIGPIPE."""
        if (found := self._by_stream.get(stream)) is not None:
            for output in found.outputs:
                if output.stream == stream:
                    output.finish()

    def resume_all(self) -> None:
        """The queue to the host has room again."""
        for found in list(self._all.values()):
            if found.running:
                for output in found.outputs:
                    output.resume()

    def signal(self, process_id: int, number: int) -> None:
        """Signal a process and all in its session; nothing when it has ended."""
        found = self._all.get(process_id)
        if found is not None and found.exit_code is None and found.spawned is not None:
            signal_session(found.spawned, number)

    def end_session(self) -> None:
        """The protocol session is over: kill its processes. They are reaped as they end."""
        for found in list(self._all.values()):
            found.started = None
            self._drop(found, forget_streams=False)
            if found.exit_code is None:
                self._dying.add(found)
                if found.spawned is not None:
                    signal_session(found.spawned, signal.SIGKILL)
        self._last_id = 0


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _after(
    pieces: Iterable[bytes | bytearray | memoryview], count: int
) -> Iterator[bytes | bytearray | memoryview]:
    """What is left of *pieces* without their first *count* bytes."""
    for piece in pieces:
        if count < len(piece):
            yield memoryview(piece)[count:] if count else piece
        count = max(0, count - len(piece))


def widen(pipe: int) -> None:
    """Let a pipe hold more, if the kernel allows that."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        return  # it stays as it is, and works


def _readable(fd: int) -> int:
    """Bytes that a pipe holds."""
    count = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return int.from_bytes(count, "little")


def _pipe_for(number: int, stream: int | None) -> tuple[int, int | None]:
    """The child's end and ours of the pipe for descriptor *number*; /dev/null when nobody is at our end."""
    if stream is None:
        return os.open("/dev/null", (os.O_WRONLY if number else os.O_RDONLY) | os.O_CLOEXEC), None
    read_end, write_end = os.pipe()
    ours, theirs = (read_end, write_end) if number else (write_end, read_end)
    os.set_blocking(ours, False)
    return theirs, ours


def signal_session(spawned: Spawned, number: int) -> None:
    """Signal a process that has not been reaped, and everything else in the session that it leads.

    SIGKILL is repeated while there is somebody left: a process may fork while the list is read.
    """
    _quietly(signal.pidfd_send_signal, spawned.pidfd, number)
    for _ in range(_KILL_ROUNDS if number == signal.SIGKILL else 1):
        members = [pid for pid in session_members(spawned.pid) if pid != spawned.pid]
        for pid in members:
            _quietly(os.kill, pid, number)
        if not members:
            return


def _quietly(send: Callable[[int, int], object], target: int, number: int) -> None:
    try:
        send(target, number)
    except ProcessLookupError:
        return  # it has ended: nothing to signal


def session_members(session: int) -> list[int]:
    """The live processes of a session, by their ids in the caller's pid namespace."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                stat_line = file.read(4096)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if session_of(stat_line) == session:
            found.append(int(name))
    return found


def session_of(stat_line: bytes) -> int:
    """The session in a line of /proc/PID/stat; -1 for a dead process. See proc(5): comm may hold anything."""
    fields = stat_line[stat_line.rfind(b")") + 2 :].split()
    if len(fields) < 4 or fields[0] in (b"Z", b"X"):
        return -1
    return int(fields[3])
