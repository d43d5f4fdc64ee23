"""Completion of names in the shell: asked of the node, with little patience and no complaints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import typer

from vcnode.cli.command import Cli, Options

if TYPE_CHECKING:
    from vcnode.client import NodeClient

TIMEOUT_S = 1.5
"""How long somebody who pressed Tab may wait."""


def complete_pod(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of pods."""

    async def names(node: NodeClient) -> Iterable[str]:
        return [pod.pod_id for pod in (await node.pod_list()).pods]

    return _ask(ctx, names, incomplete)


def complete_container(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of the containers of the pod that was typed before."""

    async def names(node: NodeClient) -> Iterable[str]:
        reply = await node.container_list(pod_id=ctx.params.get("pod_id"))
        return [container.container_id for container in reply.containers]

    return _ask(ctx, names, incomplete)


def complete_image(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of images."""

    async def names(node: NodeClient) -> Iterable[str]:
        return [image.name for image in (await node.image_list()).images]

    return _ask(ctx, names, incomplete)


def complete_node(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the nodes that answer."""

    async def ask() -> list[str]:
        async with Cli(_options(ctx)).client() as client:
            return [ping.node for ping in await client.ping_all(timeout_s=0.5)]

    return _run(ask, incomplete)


def _ask(
    ctx: typer.Context, names: Callable[[NodeClient], Awaitable[Iterable[str]]], incomplete: str
) -> list[str]:
    async def ask() -> list[str]:
        async with Cli(_options(ctx)).node() as node:
            return list(await names(node))

    return _run(ask, incomplete)


def _run(ask: Callable[[], Awaitable[list[str]]], incomplete: str) -> list[str]:
    async def bounded() -> list[str]:
        async with asyncio.timeout(TIMEOUT_S):
            return await ask()

    silent_before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        found = asyncio.run(bounded())
    except Exception:  # whatever is wrong, a Tab must not print it into the line that is being typed
        return []
    finally:
        logging.disable(silent_before)
    return sorted(name for name in found if name.startswith(incomplete))


def _options(ctx: typer.Context) -> Options:
    root = ctx.find_root().params
    return Options(
        nats_url=ctx.params.get("nats_url"),
        prefix=ctx.params.get("prefix"),
        node=ctx.params.get("node"),
        config=ctx.params.get("config"),
    ).over(
        Options(
            nats_url=root.get("nats_url"),
            prefix=root.get("prefix"),
            node=root.get("node"),
            config=root.get("config"),
        )
    )
