"""Failpoints: the node agent ends as by SIGKILL, before or after a chosen side effect.

For the tests of recovery. A side effect is a call of a driver or a commit of the database. The rules are
those of a fault plan with the action ``kill``; the grammar is in docs/mock.md. Nothing of this is in the way
of a node without such rules: `vcnode.node` puts it around drivers and store only when there are some.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from vcnode.drivers.faults import Rule

log = logging.getLogger(__name__)


class FailPoints:
    """Counts the calls of each operation from 1, and kills this process where a rule says so.

    Args:
        rules: Of a plan; those with other actions are not for here.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules: list[Rule] = []
        self._calls: Counter[str] = Counter()
        self.arm(rules)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._rules)

    def arm(self, rules: Iterable[Rule]) -> None:
        """Count from 1 anew, by other rules."""
        self._rules = [rule for rule in rules if rule.action in ("kill", "trace")]
        self._calls.clear()

    def guard(self, store: Any) -> None:
        """Put a failpoint before and after each ``write`` of *store*, named after the function written."""
        write: Callable[..., Awaitable[Any]] = store.write

        async def guarded(work: Callable[..., Any]) -> Any:
            operation = f"store.{work.__name__}" if work.__name__.isidentifier() else "store.write"
            self.before(operation)
            result = await write(work)
            self.after(operation)
            return result

        store.write = guarded

    @contextlib.contextmanager
    def around(self, operation: str) -> Iterator[None]:
        """A failpoint before and after what a driver does in one of its calls, such as ``image.unpack``."""
        self.before(operation)
        yield
        self.after(operation)

    def before(self, operation: str) -> None:
        """A call of *operation* is about to be made."""
        self._calls[operation] += 1
        self._reach(operation, "before")

    def after(self, operation: str) -> None:
        """A call of *operation* has done its work."""
        self._reach(operation, "after")

    def _reach(self, operation: str, when: str) -> None:
        call = self._calls[operation]
        for rule in self._rules:
            if rule.operation in (operation, "*") and rule.applies(call):
                if rule.action == "trace":
                    log.info("failpoint %s:%d %s", operation, call, when)
                elif rule.after == (when == "after"):
                    os.kill(os.getpid(), signal.SIGKILL)
