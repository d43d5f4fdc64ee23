"""A driver with somebody who watches its calls."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from vcnode.drivers.faults import OPERATIONS

T = TypeVar("T")

Hook = Callable[[str], None]
"""Called with the operation, such as ``hypervisor.launch``."""

Around = Callable[[str], contextlib.AbstractContextManager[None]]
"""Called with the operation; each call is made within what this gives."""

_RESULTS = {
    "hypervisor.launch": "vm",
    "hypervisor.recover": "vm",
    "agent.connect": "agent",
}
"""Calls whose results are drivers' handles, to be watched as well."""


def watched(driver: T, owner: str, *, before: Hook, after: Hook) -> T:
    """*driver* as it is, but for *before* and *after* around each of its calls that a fault plan can name.

    Args:
        driver: A driver, or a handle that one has given.
        owner: What its operations begin with: ``hypervisor``, ``vm``, ``agent``, ``network``, ``storage``.
        before: Called when nothing is done yet.
        after: Called when all is done, and the caller does not know yet; not after a failure.
    """

    @contextlib.contextmanager
    def around(operation: str) -> Iterator[None]:
        before(operation)
        yield
        after(operation)

    return surrounded(driver, owner, around)


def surrounded(driver: T, owner: str, around: Around) -> T:
    """*driver* as it is, but with each of its calls that a fault plan can name made within *around*."""
    calls = {
        name: _call(f"{owner}.{name}", name, around) for name in _operations(cast(type, type(driver)), owner)
    }
    made = type(f"Watched{type(driver).__name__}", (_Watched,), calls)
    return cast(T, made(driver))


@functools.cache
def _operations(kind: type, owner: str) -> tuple[str, ...]:
    """The calls of a driver that a fault plan can name; looked up once, since every VM has handles."""
    found = inspect.getmembers_static(kind, inspect.iscoroutinefunction)
    return tuple(name for name, _ in found if f"{owner}.{name}" in OPERATIONS)


class _Watched:
    """Stands for a driver; what is not watched goes straight to it."""

    def __init__(self, driver: object) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


def _call(operation: str, name: str, around: Around) -> Callable[..., Any]:
    async def call(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self._driver, name)
        with around(operation):
            result = await method(*map(_bare, args), **{key: _bare(value) for key, value in kwargs.items()})
        if result is not None and operation in _RESULTS:
            return surrounded(result, _RESULTS[operation], around)
        return result

    return functools.update_wrapper(call, _Watched.__getattr__, assigned=())


def _bare(value: Any) -> Any:
    """What a watched handle stands for: drivers know their own by its class."""
    return value._driver if isinstance(value, _Watched) else value
