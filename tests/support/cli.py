"""The ``vcnode`` command inside the test's process: as from a shell, but without a new interpreter."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_streams = threading.Lock()


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.out)


async def vcnode(*arguments: str, stdin: bytes = b"") -> Result:
    """Run ``vcnode ARGUMENTS`` and return how it ended."""
    return await asyncio.to_thread(run, arguments, stdin)


def run(arguments: tuple[str, ...], stdin: bytes = b"") -> Result:
    """The same, for callers without an event loop; one at a time, since the standard streams are shared."""
    from vcnode.cli.app import app

    with _streams, _replaced(stdin) as (out, err):
        try:
            app(list(arguments), prog_name="vcnode")
            code: object = 0
        except SystemExit as exc:
            code = exc.code
        sys.stdout.flush()
        sys.stderr.flush()
    number = 0 if code is None else code
    assert isinstance(number, int), number
    return Result(int(number), out.getvalue().decode(), err.getvalue().decode())


@contextmanager
def _replaced(stdin: bytes) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    before = sys.stdin, sys.stdout, sys.stderr
    out, err = io.BytesIO(), io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    sys.stdout = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(err, encoding="utf-8", write_through=True)
    try:
        yield out, err
    finally:
        # Detached: closing the wrappers would close the buffers that are still to be read.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            stream.detach()
        sys.stdin, sys.stdout, sys.stderr = before
