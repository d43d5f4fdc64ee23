"""A driver with somebody who watches its calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from vcnode.drivers.faults import OPERATIONS

T = TypeVar("T")

Hook = Callable[[str], None]
"""Called with the operation, such as ``hypervisor.launch``."""

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
    calls = {
        name: _call(f"{owner}.{name}", name, before, after)
        for name, _ in inspect.getmembers_static(type(driver), inspect.iscoroutinefunction)
        if f"{owner}.{name}" in OPERATIONS
    }
    made = type(f"Watched{type(driver).__name__}", (_Watched,), calls)
    return cast(T, made(driver))


class _Watched:
    """Stands for a driver; what is not watched goes straight to it."""

    def __init__(self, driver: object) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


def _call(operation: str, name: str, before: Hook, after: Hook) -> Callable[..., Any]:
    async def call(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        before(operation)
        method = getattr(self._driver, name)
        result = await method(*map(_bare, args), **{key: _bare(value) for key, value in kwargs.items()})
        after(operation)
        if result is not None and operation in _RESULTS:
            return watched(result, _RESULTS[operation], before=before, after=after)
        return result

    return functools.update_wrapper(call, _Watched.__getattr__, assigned=())


def _bare(value: Any) -> Any:
    """What a watched handle stands for: drivers know their own by its class."""
    return value._driver if isinstance(value, _Watched) else value
