"""A guest that runs hyperstart, as far as its host can see: written from the description of the protocol.

It listens on two UNIX sockets, as QEMU does, and runs what it is told to run as processes of this host. Its
parser is as strict as the real one, and its quirks are the real one's: input that finds 512 bytes waiting is
dropped, a signal as text is 0, a stream that nobody has is answered with an empty frame, a death by signal is
told as 0 by version 4242, which also forgets its pod with the last container.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INPUT_BUFFER = 512
READ_CHUNK = 1024
MAX_TTY_FRAME = 4096
CONTAINER_KEYS = {
    *("id", "image", "rootfs", "fstype", "addr", "volumes", "fsmap", "sysctl", "process", "restartPolicy"),
    "initialize",
}
POD_KEYS = {"hostname", "containers", "interfaces", "dns", "routes", "shareDir", "portmappingWhiteLists"}
PROCESS_KEYS = {
    *("user", "group", "additionalGroups", "terminal", "stdio", "stderr", "args", "envs", "workdir"),
}
STARTPOD, DESTROYPOD, EXECCMD, READY, ACK, ERROR, WINSIZE, PING = 1, 4, 6, 8, 9, 10, 11, 12
FINISHPOD, NEXT, WRITEFILE, READFILE, NEWCONTAINER, KILLCONTAINER = 13, 14, 15, 16, 17, 18
ONLINECPUMEM, SETUPINTERFACE, SETUPROUTE, REMOVECONTAINER, ASYNC, SIGNALPROCESS = 19, 20, 21, 22, 23, 24


class RefusedError(Exception):
    """Answered with ERROR."""


def need(condition: object, why: str) -> None:
    """Refuse a command unless *condition*."""
    if not condition:
        raise RefusedError(why)


@dataclass(eq=False)
class Process:
    """A process of the guest."""

    container: str
    id: str
    stdio: int
    stderr: int
    popen: subprocess.Popen[bytes] | None = None
    input_fd: int = -1
    waiting: bytearray = field(default_factory=bytearray)
    """Input that the guest holds."""
    close_requested: bool = False
    open_outputs: int = 0
    code: int | None = None
    terminal: bool = False


class FakeHyperstart:
    """One guest.

    Args:
        directory: Where its sockets are, ``ctl.sock`` and ``tty.sock``; ``shared`` is its 9p share.
        version: What it answers to VERSION.
        fork: Whether it is clearcontainers'.
    """

    def __init__(self, directory: Path, version: int = 4244, *, fork: bool = False) -> None:
        self.directory = directory
        self.version = version
        self.fork = fork
        self.commands: list[tuple[int, Any]] = []
        """What it was told, in order: code and JSON (or bytes)."""
        self.refusals: list[str] = []
        self.refuse: set[int] = set()
        """Codes of commands that it answers with ERROR."""
        self.silent: set[int] = set()
        """Codes of commands that it does not answer."""
        self.keeps_next = False
        """Whether it says no NEXT, as if its port had no room."""
        self.begun = {"ctl": b"", "tty": b""}
        """What the next client hears first: the rest of what was sent to the one before."""
        self.lost_input = 0
        self.largest_chunk = 0
        """Most bytes of commands that were under way at once."""
        self.off = asyncio.Event()
        """Set once it has powered off."""
        self.changed = asyncio.Event()
        """Set whenever a process is over."""
        self.pod: Mapping[str, Any] | None = None
        self.containers: dict[str, Process] = {}
        self.processes: list[Process] = []
        self.destroying = False
        self.size: dict[str, tuple[int, int]] = {}
        self._ready_sent = False
        self._ctl: asyncio.StreamWriter | None = None
        self._tty: asyncio.StreamWriter | None = None
        self._servers: list[asyncio.Server] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen."""
        for name, serve in (("ctl", self._serve_ctl), ("tty", self._serve_tty)):
            path = str(self.directory / f"{name}.sock")
            self._servers.append(await asyncio.start_unix_server(serve, path))

    async def stop(self) -> None:
        """Kill everything."""
        for server in self._servers:
            server.close()
        for writer in self._writers:
            writer.transport.abort()
        for process in list(self.processes):
            if process.popen is not None and process.popen.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.popen.pid, signal.SIGKILL)
        while self.processes:  # their ends are heard by the loop
            await self.changed.wait()
            self.changed.clear()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.off.set()

    def _joined(self, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        if (task := asyncio.current_task()) is not None:
            self._tasks.add(task)

    @property
    def sent(self) -> Callable[[int], list[Any]]:
        """What was sent with a code."""
        return lambda code: [payload for each, payload in self.commands if each == code]

    def tell(self, code: int, payload: bytes = b"") -> None:
        """Send a message."""
        if self._ctl is not None:
            self._ctl.write(struct.pack(">II", code, 8 + len(payload)) + payload)

    def put(self, seq: int, data: bytes = b"") -> None:
        """Send a frame of a stream."""
        self.put_raw(struct.pack(">QI", seq, 12 + len(data)) + data)

    def put_raw(self, data: bytes) -> None:
        """Send bytes by the channel of streams."""
        if self._tty is not None:
            self._tty.write(data)

    def tell_raw(self, data: bytes) -> None:
        """Send bytes by the channel of commands."""
        if self._ctl is not None:
            self._ctl.write(data)

    # -- commands ----------------------------------------------------------------------------------

    async def _serve_ctl(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._joined(writer)
        self._ctl = writer
        self.tell_raw(self.begun["ctl"])
        if not self._ready_sent:
            self._ready_sent = True
            self.tell(READY)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                header = await self._read(reader, 8)
                code, length = struct.unpack(">II", header)
                payload = await self._read(reader, length - 8)
                if code not in self.silent:
                    self._answer(code, payload)
        if self._ctl is writer:
            self._ctl = None
        await _close(writer)

    async def _read(self, reader: asyncio.StreamReader, count: int) -> bytes:
        """Read as the guest does: what is there, and NEXT for it."""
        data = b""
        while len(data) < count:
            part = await reader.read(min(READ_CHUNK, count - len(data)))
            if not part:
                raise asyncio.IncompleteReadError(data, count)
            self.largest_chunk = max(self.largest_chunk, len(part))
            data += part
            if not self.keeps_next:
                self.tell(NEXT, struct.pack(">I", len(part)))
        return data

    def _answer(self, code: int, payload: bytes) -> None:
        self.commands.append((code, _decode(payload)))
        try:
            need(code not in self.refuse, "told to")
            answer = self._carry_out(code, payload)
        except (RefusedError, OSError, KeyError, TypeError, ValueError) as exc:
            self.refusals.append(f"{code}: {exc!r}")
            self.tell(ERROR)
        else:
            if answer is not None:
                self.tell(ACK, answer)

    def _carry_out(self, code: int, payload: bytes) -> bytes | None:
        match code:
            case 0:
                return struct.pack(">I", self.version)
            case 12 | 19:
                need(not payload, "no payload")
                return b""
            case 4:
                return self._destroy()
            case 15:
                return self._write_file(payload)
        fields = json.loads(payload)
        acts: dict[int, Callable[[Any], bytes]] = {
            STARTPOD: self._start_pod,
            EXECCMD: self._execute,
            WINSIZE: self._resize,
            READFILE: self._read_file,
            NEWCONTAINER: self._new_container,
            KILLCONTAINER: self._kill,
            SETUPINTERFACE: self._interface,
            SETUPROUTE: lambda f: self._routes(f["routes"]),
            REMOVECONTAINER: self._remove,
        }
        if self.named and code == SIGNALPROCESS and not self.fork:
            return self._signal(fields)
        need(code in acts, f"unknown command {code}")
        return acts[code](fields)

    @property
    def named(self) -> bool:
        """Whether processes have ids."""
        return self.version > 4242 and not self.fork

    def _start_pod(self, fields: Mapping[str, Any]) -> bytes:
        need(fields.keys() <= POD_KEYS, f"pod keys {fields.keys() - POD_KEYS}")
        for each in fields["interfaces"]:
            self._interface(each)
        self._routes(fields["routes"])
        need(all(isinstance(server, str) for server in fields["dns"]), "dns")
        self.pod = fields
        for each in fields["containers"]:
            self._new_container(each)
        return b""

    def _interface(self, fields: Mapping[str, Any]) -> bytes:
        keys = {"device", "ipAddress", "netMask", "newDeviceName"}
        if self.version > 4242:
            keys |= {"ipAddresses", "mtu"}
        need(fields.keys() <= keys, f"interface keys {fields.keys() - keys}")
        addresses = fields.get("ipAddresses") or [fields]
        need(fields["device"], "device")
        for each in addresses:
            need(all(0 <= int(part) < 256 for part in each["ipAddress"].split(".")), "address")
            need(0 <= int(each["netMask"]) <= 32, "mask")
        return b""

    def _routes(self, routes: list[Mapping[str, str]]) -> bytes:
        for each in routes:
            need(each.keys() <= {"dest", "gateway", "device"}, "route keys")
            need(each["dest"] == "default" or each["dest"].count(".") == 3, "dest")
        return b""

    def _new_container(self, fields: Mapping[str, Any]) -> bytes:
        need(self.pod is not None, "the pod is not created yet")
        need(fields.keys() <= CONTAINER_KEYS, f"container keys {fields.keys() - CONTAINER_KEYS}")
        need(fields["id"] not in self.containers, "id conflict")
        process = self._run(fields["id"], fields["process"])
        self.containers[fields["id"]] = process
        return b""

    def _execute(self, fields: Mapping[str, Any]) -> bytes:
        container = fields["container"]
        if not (self.named and container == "hyperstart"):
            need(container in self.containers, "no such container")
        if self.named:
            ids = {process.id for process in self.processes if process.id != "init"}
            need(fields["process"]["id"] not in ids, "process id conflict")
        self._run(container, fields["process"])
        return b""

    def _run(self, container: str, fields: Mapping[str, Any]) -> Process:
        keys = set(PROCESS_KEYS)
        if self.named:
            keys |= {"id"}
        if self.fork:
            keys |= {"rlimits", "noNewPrivileges", "capabilities"}
        need(fields.keys() <= keys, f"process keys {fields.keys() - keys}")
        terminal, stdio, stderr = fields["terminal"] is True, fields["stdio"], fields["stderr"]
        need(0 < stdio < 1 << 63, "stdio must be set")
        need(0 <= stderr < 1 << 63 and (terminal or stderr), "stderr must be set")
        need("user" in fields or not {"group", "additionalGroups"} & fields.keys(), "group without user")
        process = Process(container, fields.get("id", "init"), stdio, stderr, terminal=terminal)
        user = int(fields["user"]) if fields.get("user", "").isdigit() else None
        group = int(fields["group"]) if fields.get("group", "").isdigit() else None
        need("user" not in fields or fields["user"] == "root" or user is not None, "no such user")
        try:
            self._spawn(process, fields, user, group)
        except FileNotFoundError:
            need(not self.named, "exec failed")
            process.code = 127
            asyncio.get_running_loop().call_soon(self._look_whether_over, process)
        self.processes.append(process)
        return process

    def _spawn(
        self, process: Process, fields: Mapping[str, Any], user: int | None, group: int | None
    ) -> None:
        loop = asyncio.get_running_loop()
        if process.terminal:
            master, slave = pty.openpty()
            ends: dict[str, int] = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
            outputs, closes, process.input_fd = [(master, process.stdio)], [slave], os.dup(master)
        else:
            (r0, w0), (r1, w1), (r2, w2) = (os.pipe() for _ in range(3))
            ends = {"stdin": r0, "stdout": w1, "stderr": w2}
            outputs, closes, process.input_fd = [(r1, process.stdio), (r2, process.stderr)], [r0, w1, w2], w0
        try:
            process.popen = subprocess.Popen(
                fields["args"],
                **ends,  # type: ignore[call-overload]
                env={"PATH": os.environ["PATH"], **{e["env"]: e["value"] for e in fields["envs"]}},
                cwd=fields["workdir"],
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=[] if user is not None else None,
            )
        except BaseException:
            for fd in (*closes, process.input_fd, *(fd for fd, _ in outputs)):
                os.close(fd)
            process.input_fd = -1
            raise
        for fd in closes:
            os.close(fd)
        for fd in (process.input_fd, *(fd for fd, _ in outputs)):
            os.set_blocking(fd, False)
        for fd, seq in outputs:
            process.open_outputs += 1
            loop.add_reader(fd, self._output, process, fd, seq)
        pidfd = os.pidfd_open(process.popen.pid)
        loop.add_reader(pidfd, self._ended, process, pidfd)

    def _output(self, process: Process, fd: int, seq: int) -> None:
        if self._tty is not None and self._tty.transport.get_write_buffer_size() > 64 * 1024:
            return  # its port is full; asked again at once, as nothing else happens meanwhile
        try:
            data = os.read(fd, 8 * 1024)
        except BlockingIOError:
            return
        except OSError:  # a terminal whose other end is closed
            data = b""
        if data:
            self.put(seq, data)
            return
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        process.open_outputs -= 1
        self._look_whether_over(process)

    def _ended(self, process: Process, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        assert process.popen is not None
        code = process.popen.wait()
        process.code = code if code >= 0 else 0 if self.version == 4242 else 128 - code
        if self.containers.get(process.container) is process:
            for other in self.processes:  # what is in the namespace of a container ends with it
                if other.container == process.container and other.code is None and other.popen is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(other.popen.pid, signal.SIGKILL)
        self._look_whether_over(process)

    def _look_whether_over(self, process: Process) -> None:
        if process.code is None or process.open_outputs or process not in self.processes:
            return
        self.processes.remove(process)
        self.changed.set()
        self._close_input(process)
        self.put(process.stdio)
        if not self.named:
            self.put(process.stdio, bytes([process.code]))
        else:
            event = {"container": process.container, "process": process.id, "event": "finished"}
            self.tell(ASYNC, json.dumps({**event, "status": process.code}).encode())
        if self.containers.get(process.container) is process:
            self._main_is_over()

    def _main_is_over(self) -> None:
        if any(process in self.processes for process in self.containers.values()):
            return
        if self.destroying:
            self.tell(ACK)
            self._power_off()
        elif not self.named:
            if not self.fork:
                codes = [process.code or 0 for process in self.containers.values()]
                self.tell(FINISHPOD, b"".join(struct.pack(">I", code) for code in codes))
            self.containers.clear()
            self.pod = None

    def _destroy(self) -> bytes | None:
        running = [p for p in self.containers.values() if p in self.processes]
        if not running:
            asyncio.get_running_loop().call_soon(self._power_off)
            return b""
        self.destroying = True
        for process in self.processes:
            if process.popen is not None:
                os.killpg(process.popen.pid, signal.SIGTERM)
        return None

    def _power_off(self) -> None:
        for writer in (self._ctl, self._tty):
            if writer is not None:
                writer.close()
        self.off.set()

    def _kill(self, fields: Mapping[str, Any]) -> bytes:
        process = self.containers[fields["container"]]
        number = fields["signal"] if type(fields["signal"]) is int else 0
        if process.popen is not None and process.code is None:
            os.kill(process.popen.pid, number)
        return b""

    def _signal(self, fields: Mapping[str, Any]) -> bytes:
        for process in self.processes:
            if (process.container, process.id) == (fields["container"], fields["process"]):
                assert process.popen is not None
                os.killpg(process.popen.pid, fields["signal"])
                return b""
        raise RefusedError("can not find process")

    def _remove(self, fields: Mapping[str, Any]) -> bytes:
        need(self.containers[fields["container"]] not in self.processes, "has not been stopped")
        del self.containers[fields["container"]]
        return b""

    def _resize(self, fields: Mapping[str, Any]) -> bytes:
        keys = {"container", "process", "row", "column"} if self.version > 4242 else {"seq", "row", "column"}
        need(fields.keys() == keys, f"winsize keys {fields.keys()}")
        for process in self.processes:
            found = (
                process.stdio == fields.get("seq")
                if self.version == 4242
                else (process.container, process.id) == (fields["container"], fields["process"])
            )
            if found or (self.fork and process.terminal and process.container == fields["container"]):
                size = struct.pack("HHHH", fields["row"], fields["column"], 0, 0)
                fcntl.ioctl(process.input_fd, termios.TIOCSWINSZ, size)
        return b""

    def _path(self, fields: Mapping[str, str]) -> Path:
        need(fields["container"] in self.containers, "no such container")
        return self.directory / "files" / fields["container"] / fields["file"].lstrip("/")

    def _read_file(self, fields: Mapping[str, str]) -> bytes:
        return self._path(fields).read_bytes()

    def _write_file(self, payload: bytes) -> bytes:
        head, brace, data = payload.partition(b"}")
        self._path(json.loads(head + brace)).write_bytes(data)
        return b""

    # -- streams -----------------------------------------------------------------------------------

    async def _serve_tty(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._joined(writer)
        self._tty = writer
        self.put_raw(self.begun["tty"])
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                header = await reader.readexactly(12)
                seq, length = struct.unpack(">QI", header)
                assert 12 <= length <= MAX_TTY_FRAME, "the guest's loop would end here"
                # What has come is read before anything is written: the real one reads a frame in each turn of
                # its loop, and writes to the process after that of the next turn.
                self._input(seq, await reader.readexactly(length - 12))
        if self._tty is writer:
            self._tty = None
        await _close(writer)

    def _input(self, seq: int, data: bytes) -> None:
        process = next((p for p in self.processes if p.stdio == seq), None)
        loop = asyncio.get_running_loop()
        if process is None:
            loop.call_soon(self.put, seq)
            return
        if process.close_requested or process.input_fd < 0:
            return
        if not data:
            process.close_requested = not process.terminal
        kept = data[: INPUT_BUFFER - len(process.waiting)]
        self.lost_input += len(data) - len(kept)
        process.waiting += kept
        self._pass_on(process)

    def _pass_on(self, process: Process) -> None:
        """Write what waits to the process, in the next turn of the loop."""
        loop = asyncio.get_running_loop()

        def write() -> None:
            loop.remove_writer(fd)
            if process.input_fd != fd:
                return
            try:
                del process.waiting[: os.write(fd, process.waiting)]
            except BlockingIOError:
                pass
            except OSError:
                process.waiting.clear()
            if process.waiting:
                loop.add_writer(fd, write)
            elif process.close_requested:
                self._close_input(process)

        fd = process.input_fd
        loop.add_writer(fd, write)

    def _close_input(self, process: Process) -> None:
        if process.input_fd >= 0:
            asyncio.get_running_loop().remove_writer(process.input_fd)
            os.close(process.input_fd)
            process.input_fd = -1


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def _decode(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except ValueError:
        return payload


@contextlib.asynccontextmanager
async def fake_hyperstart(
    directory: Path, version: int = 4244, *, fork: bool = False
) -> AsyncIterator[FakeHyperstart]:
    """A guest that listens, and ends with the block."""
    guest = FakeHyperstart(directory, version, fork=fork)
    await guest.start()
    try:
        yield guest
    finally:
        await guest.stop()
