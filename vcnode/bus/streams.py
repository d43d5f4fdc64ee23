"""Streams are made when they are missing; what exists is never changed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import nats.js.errors
from nats.js.api import StorageType, StreamConfig

from vcnode.bus.library import uncancelled
from vcnode.settings import NatsSettings

if TYPE_CHECKING:
    from nats.js import JetStreamContext

log = logging.getLogger(__name__)


def storage(settings: NatsSettings) -> StorageType:
    """Where new streams and buckets are kept."""
    return StorageType.FILE if settings.stream_storage == "file" else StorageType.MEMORY


async def ensure_stream(js: JetStreamContext, config: StreamConfig) -> StreamConfig:
    """Make the stream of *config* unless there is one of its name; returns what it is like then.

    Raises:
        nats.errors.Error: JetStream refuses or does not answer.
    """
    name = config.name or ""
    try:
        return (await uncancelled(js.stream_info(name))).config
    except nats.js.errors.NotFoundError:
        pass
    try:
        made = await uncancelled(js.add_stream(config))
    except nats.js.errors.BadRequestError as exc:
        # Another node made it meanwhile, with other settings: its stream is as good.
        found = await uncancelled(js.stream_info(name))
        log.info("Stream %s was made by somebody else", name, extra={"reason": str(exc)})
        return found.config
    log.info("Made stream %s", name)
    return made.config
