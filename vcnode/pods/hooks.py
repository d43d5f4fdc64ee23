"""Hooks: programs on the host that run at points of a pod's life, with the OCI state on standard input.

A hook runs as the node agent does, in a session of its own, and ends with it: it is killed at its time limit,
and by the kernel when the node agent dies.
Source: OCI runtime specification, config.md (POSIX-platform Hooks) and runtime.md (State).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping, Sequence

from vcnode import aio
from vcnode.drivers.base import Storage
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, VcnodeError
from vcnode.models.hooks import Hook, Hooks
from vcnode.models.records import PodRecord

log = logging.getLogger(__name__)

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OCI_VERSION = "1.2.0"
NETNS = "io.vcnode.netns"
"""Annotation with the path of the pod's network namespace."""
MAX_OUTPUT_BYTES = 4096
"""What is kept of a hook's output, for messages."""
KILL_LIMIT_S = 5.0


class HookFailedError(FailedPreconditionError):
    """A hook ended with another code than 0, did not end in time, or could not be run."""


def state_of(record: PodRecord, status: str) -> bytes:
    """The OCI state of a pod: its annotations, and `NETNS`."""
    vm, network = record.vm, record.network
    state: dict[str, object] = {"ociVersion": OCI_VERSION, "id": record.pod_id, "status": status}
    if vm is not None:
        state |= {"bundle": vm.directory} | ({"pid": vm.pid} if vm.pid is not None else {})
    netns = {NETNS: network.netns_path} if network is not None and network.netns_path is not None else {}
    return json.dumps(state | {"annotations": {**record.spec.annotations, **netns}}).encode()


async def check_hooks(storage: Storage, hooks: Hooks, where: str = "pod.hooks") -> None:
    """See that every hook can be run.

    Raises:
        InvalidArgumentError, NotFoundError: As `Storage.open_hook`; names the field.
    """
    points: Mapping[str, Sequence[Hook]] = {
        name: getattr(hooks, name) for name in ("pre_start", "post_start", "post_stop")
    }
    for point, each in points.items():
        for number, hook in enumerate(each):
            field = f"{where}.{point}[{number}].path"
            try:
                os.close(await storage.open_hook(hook.path))
            except NotFoundError as exc:
                raise NotFoundError(f"{field}: {exc.message}", **{**exc.details, "field": field}) from exc
            except InvalidArgumentError as exc:
                raise InvalidArgumentError.field(field, exc.message) from exc


async def run_all(storage: Storage, hooks: Sequence[Hook], state: bytes) -> None:
    """Run *hooks* one by one; the first that fails is the last. Raises HookFailedError."""
    for hook in hooks:
        await run(storage, hook, state)


async def run_all_softly(storage: Storage, hooks: Sequence[Hook], state: bytes) -> None:
    """Run *hooks* one by one; those that fail are logged, and the others run."""
    for hook in hooks:
        try:
            await run(storage, hook, state)
        except HookFailedError as exc:
            log.warning("%s", exc.message)


async def run(storage: Storage, hook: Hook, state: bytes) -> None:
    """Run one; returns when it has ended with code 0. Whatever happens, it has ended afterwards.

    Raises:
        HookFailedError: It did not do that within its time, or could not be run.
    """
    try:
        fd = await storage.open_hook(hook.path)
    except VcnodeError as exc:
        raise HookFailedError(f"Hook {hook.path!r} cannot be run: {exc.message}", path=hook.path) from exc
    # What was checked is what runs: the program is its open file, whatever its path means by now.
    setpriv = shutil.which("setpriv") or "/usr/bin/setpriv"  # not by the hook's environment
    argv = [setpriv, "--pdeathsig", "KILL", "--", f"/proc/self/fd/{fd}", *hook.args]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": PATH, **dict(line.split("=", 1) for line in hook.env)},
            pass_fds=(fd,),
            cwd="/",
            start_new_session=True,
        )
    except OSError as exc:
        raise HookFailedError(f"Hook {hook.path!r} cannot be run: {exc.strerror}.", path=hook.path) from exc
    finally:
        os.close(fd)
    talking = asyncio.ensure_future(_talk(process, state))
    try:
        async with asyncio.timeout(hook.timeout_s):
            await _ended(process.pid)
            _kill_session(process.pid)  # what it has left behind may hold its output open
            output, code = await talking, await process.wait()
    except TimeoutError as exc:
        raise HookFailedError(
            f"Hook {hook.path!r} did not end within {hook.timeout_s:g} s.", path=hook.path
        ) from exc
    finally:
        talking.cancel()
        await aio.finish(_end(process), timeout_s=KILL_LIMIT_S)
    if code != 0:
        words = output.decode(errors="replace").strip()
        raise HookFailedError(
            f"Hook {hook.path!r} ended with code {code}{f': {words[:500]}' if words else '.'}",
            path=hook.path,
            exit_code=code,
        )


async def _talk(process: asyncio.subprocess.Process, state: bytes) -> bytes:
    """Give the state, and take the output: its beginning is returned, the rest dropped."""
    if process.stdin is None or process.stdout is None:  # cannot be: both are pipes
        return b""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read
        process.stdin.write(state)
        await process.stdin.drain()
        process.stdin.close()
    kept = bytearray()
    while chunk := await process.stdout.read(65_536):
        kept += chunk[: MAX_OUTPUT_BYTES - len(kept)]
    return bytes(kept)


async def _ended(pid: int) -> None:
    """Wait until a child has ended; `Process.wait` waits for the other ends of its pipes as well."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    try:
        loop.add_reader(pidfd, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of a hook and its children in its session."""
    _kill_session(process.pid)
    await process.wait()


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
