"""Network namespaces: made, removed, and worked in, by threads of their own.

setns(2) and unshare(2) move the calling thread only. Each piece of work gets a thread that ends with it, so
no thread of the node agent is ever left in a namespace of a pod, whatever fails; and what the kernel takes
its time for (an interface is removed only after a grace period of some 20 ms) does not stop the event loop.

A namespace is kept by a bind mount below `DIRECTORY`, where ``ip netns`` lists it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from vcnode import aio
from vcnode.drivers.exhaustion import exhausted, exhausted_by
from vcnode.errors import NetworkError, ResourceExhaustedError

T = TypeVar("T")

DIRECTORY = Path("/run/netns")
"""Where iproute2 keeps named namespaces, and others look for them."""
RUN_LIMIT_S = 60.0
"""Seconds that a cancelled caller waits at most for its thread: netlink answers within milliseconds."""

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 0x1000, 0x4000, 1 << 20
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


def path_of(name: str) -> str:
    """The file of the namespace of that name."""
    return str(DIRECTORY / name)


def call(netns_path: str | None, work: Callable[[], T]) -> T:
    """Run *work* in a thread inside a namespace, and wait for it.

    What it forks is born in that namespace. Blocks the caller: for what takes a millisecond.

    Args:
        netns_path: The namespace; None: that of the process.
        work: What to do.

    Raises:
        NetworkError: There is no such namespace, or it may not be entered.
        ResourceExhaustedError: The host, or the node agent's limits, have no room for it.
    """
    thread = _Thread(netns_path, work)
    thread.begin()
    thread.join()
    outcome: T = thread.outcome()
    return outcome


async def run(netns_path: str | None, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in an event loop and a thread of its own, inside a namespace.

    Sockets that it opens are of that namespace. A cancellation is held back until it has ended: a thread
    cannot be stopped, and whoever undoes what it makes must not come before it. Raises as `call`.
    """
    return await run_blocking(netns_path, lambda: here(work))


async def run_blocking(netns_path: str | None, work: Callable[[], T]) -> T:
    """As `call`, without blocking the event loop, and with `run`'s care for cancellations."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    thread = _Thread(netns_path, work, lambda: loop.call_soon_threadsafe(_settle, ended))
    thread.begin()

    async def wait() -> None:
        await ended

    await aio.finish(wait(), timeout_s=RUN_LIMIT_S)
    outcome: T = thread.outcome()
    return outcome


def here(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in an event loop of the calling thread, which has none.

    Unlike `asyncio.run` it makes the coroutine after the loop, whose descriptors there may not be.
    """
    with asyncio.Runner() as runner:
        runner.get_loop()
        return runner.run(work())


async def run_in_new(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As `run`, in a new namespace that ends with it. Raises NetworkError where none can be made."""

    def enter_new() -> T:
        try:
            _unshare()
        except OSError as exc:
            refused = NetworkError(f"No network namespace can be made: {exc.strerror}.")
            raise exhausted(exc) or refused from exc
        return here(work)

    return await run_blocking(None, enter_new)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Thread(threading.Thread):
    """One piece of work inside a namespace."""

    def __init__(
        self, netns_path: str | None, work: Callable[[], Any], on_end: Callable[[], object] | None = None
    ) -> None:
        super().__init__(name=f"netns {netns_path}", daemon=True)
        self._netns_path = netns_path
        self._work: Callable[[], Any] = work
        self._on_end = on_end
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            if self._netns_path is not None:
                enter(self._netns_path)
            self._result = self._work()
        except OSError as exc:  # of the event loop and its sockets, say
            self._error = short = exhausted(exc) or exc
            if short is not exc:
                short.__cause__ = exc
        except BaseException as exc:  # it is raised in the thread that waits
            self._error = exc
        finally:
            if self._on_end is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    self._on_end()

    def begin(self) -> None:
        """Start it. Raises ResourceExhaustedError when the host has no thread for it."""
        try:
            self.start()
        except RuntimeError as exc:  # all that Python tells of EAGAIN
            raise exhausted_by(errno.EAGAIN) or exc from exc

    def outcome(self) -> Any:
        """What the work has returned, or raised."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # or thread, error and its frames hold each other
        return self._result


def enter(netns_path: str) -> None:
    """Move the calling thread into a namespace. For threads that end soon, such as those of `call`.

    Raises:
        NetworkError: There is no such namespace, or it may not be entered.
    """
    try:
        fd = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(fd, _CLONE_NEWNET):
                raise _failed("setns")
        finally:
            os.close(fd)
    except OSError as exc:
        message = f"Network namespace {netns_path} cannot be entered: {exc.strerror}."
        raise exhausted(exc) or NetworkError(message) from exc


def create(name: str, set_up: Callable[[], T]) -> T:
    """Make a namespace and run *set_up* inside. Blocking: for `run_blocking`'s threads, or `call`'s.

    The calling thread stays in the new namespace. On failure nothing is left.

    Raises:
        NetworkError: It could not be made, or the name is taken.
        ResourceExhaustedError: The host, or the node agent's limits, have no room for it.
    """
    path = path_of(name)
    try:
        _share_directory()
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    except OSError as exc:
        raise exhausted(exc) or NetworkError(f"{path} cannot be made: {exc.strerror}.") from exc
    try:
        _unshare()
        own = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        _mount(own, path, _MS_BIND)
        return set_up()
    except BaseException as exc:
        remove(name)
        if isinstance(exc, OSError):
            raise exhausted(exc) or NetworkError(f"{path} cannot be made: {exc.strerror}.") from exc
        raise


def _unshare() -> None:
    """Move the calling thread into a new namespace. Raises OSError, and ResourceExhaustedError."""
    if _libc.unshare(_CLONE_NEWNET):
        failed = _failed("unshare")
        if failed.errno == errno.ENOSPC:  # no disk is meant. Source: user_namespaces(7), namespaces(7)
            raise ResourceExhaustedError(
                "The host has as many network namespaces as it allows; raise user.max_net_namespaces."
            ) from failed
        raise failed


def remove(name: str) -> None:
    """Remove a namespace's file; the kernel frees it once nothing runs in it. Idempotent.

    Raises:
        NetworkError: It is still there.
    """
    path = path_of(name)
    while _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        pass  # once for each mount there
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise NetworkError(f"Network namespace {path} cannot be removed: {exc.strerror}.") from exc


def names(prefix: str) -> list[str]:
    """Names of the namespaces, finished and begun, that begin with *prefix*."""
    try:
        return sorted(name for name in os.listdir(DIRECTORY) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def exists(netns_path: str) -> bool:
    """Whether that file is a namespace, and not what a removal or a reboot has left of one."""
    try:
        with open(netns_path, "rb") as file:
            return os.fstat(file.fileno()).st_dev == os.stat("/proc/self/ns/net").st_dev
    except OSError:
        return False


def _share_directory() -> None:
    """Make the directory a shared mount, as ``ip netns add`` does: other mount namespaces see removals."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    try:
        _mount(None, str(DIRECTORY), _MS_SHARED | _MS_REC)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        _mount(str(DIRECTORY), str(DIRECTORY), _MS_BIND | _MS_REC)
        _mount(None, str(DIRECTORY), _MS_SHARED | _MS_REC)


def _mount(source: str | None, target: str, flags: int) -> None:
    if _libc.mount(source and os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None):
        raise _failed(f"mount {target}")


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
