"""Logging: JSON lines for machines, coloured text on a terminal; every line carries what it is about."""

from __future__ import annotations

import logging
import sys
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
    ``structlog.contextvars`` (command id, pod id) are on every line. May be called again.
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


def stderr(
    form: Literal["auto", "json", "text"], level: Literal["debug", "info", "warning", "error"]
) -> None:
    """`configure` for standard error."""
    configure(form=form, level=level, stream=sys.stderr)
