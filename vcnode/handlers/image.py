"""Commands about images."""

from __future__ import annotations

from vcnode.handlers.services import Services
from vcnode.models.call import Call
from vcnode.models.commands import Empty, ImageImport, ImagePull, ImageRef, ImageRemoved, ImageStatuses
from vcnode.models.node import ImageStatus


async def image_import(node: Services, call: Call, request: ImageImport) -> ImageStatus:
    """``image.import``."""
    return await node.images.import_(request.name, request.path, call)


async def image_pull(node: Services, call: Call, request: ImagePull) -> ImageStatus:
    """``image.pull``."""
    return await node.images.pull(request, call)


def image_list(node: Services, call: Call, request: Empty) -> ImageStatuses:
    """``image.list``."""
    return node.images.list()


def image_status(node: Services, call: Call, request: ImageRef) -> ImageStatus:
    """``image.status``."""
    return node.images.status(request.name)


async def image_remove(node: Services, call: Call, request: ImageRef) -> ImageRemoved:
    """``image.remove``."""
    return await node.images.remove(request.name, call)
