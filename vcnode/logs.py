"""Logging: JSON lines for machines, coloured text on a terminal; every line carries what it is about.

A command's lines carry ``verb``, ``command_id``, ``trace_id`` if its sender or this node traces it, and
``pod_id`` and ``container_id`` if it names them; those of the node's own work on a pod the last two.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Literal, TextIO

import structlog


def configure(
    *,
    form: Literal["auto", "json", "text"],
    level: Literal["debug", "info", "warning", "error"],
    stream: TextIO,
) -> None:
    """Send all logs of this process to *stream*.

    Args:
        form: ``auto`` is text on a terminal and JSON otherwise.
        level: Least severe level that is written.
        stream: Usually standard error.

    Both structlog's and the standard library's loggers end here; values bound with
    ``structlog.contextvars`` (see `about` and `own_work`) are on every line. May be called again.
    """
    text = form == "text" or (form == "auto" and stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=stream.isatty())]
        if text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("asyncio", "nats", "qemu"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


about = structlog.contextvars.bound_contextvars
"""Within ``with about(container_id="c1"):`` lines carry this beside what they carried before."""


def names(pod_id: str, container_id: str | None = None) -> dict[str, str]:
    """The marks of lines about a pod, or one of its containers."""
    return {"pod_id": pod_id} if container_id is None else {"pod_id": pod_id, "container_id": container_id}


@contextlib.contextmanager
def own_work(**marks: str) -> Iterator[None]:
    """Within this, lines are of the node's own work: they carry *marks*, and nothing of a command.

    A task keeps what was bound where it was spawned. What outlives the command that began it, such as the
    watch of a VM, is therefore spawned within this, or its lines would be taken for that command's for ever.
    """
    before = structlog.contextvars.get_contextvars()
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**marks)
    try:
        yield
    finally:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**before)


def stderr(
    form: Literal["auto", "json", "text"], level: Literal["debug", "info", "warning", "error"]
) -> None:
    """`configure` for standard error."""
    configure(form=form, level=level, stream=sys.stderr)
