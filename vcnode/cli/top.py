"""``vcnode top``: nodes, pods and containers live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from vcnode.cli.command import Cli, command

if TYPE_CHECKING:
    from vcnode.cli.top_data import Gatherer, SortKey


class Sort(StrEnum):
    """What comes first."""

    CPU = "cpu"
    MEMORY = "memory"
    NAME = "name"


KEYS = {b"c": Sort.CPU, b"m": Sort.MEMORY, b"n": Sort.NAME}
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
QUIT = frozenset({b"q", b"Q", b"\x1b", b"\x03", b"\x04"})
RATE_S = 1.0
"""Seconds between the two samples that rates need, where nothing was shown before."""


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    command(app, "top")(top)


async def top(
    cli: Cli,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot and end.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, max=240.0, help="Between two looks.")
    ] = 2.0,
    sort: Annotated[Sort, typer.Option("--sort", help="What comes first.")] = Sort.CPU,
    no_guest: Annotated[
        bool, typer.Option("--no-guest", help="Ask hosts only: wakes no guest, and shows no containers.")
    ] = False,
) -> None:
    """Show what nodes, pods and containers use, live, over the whole fleet or the node named by --node.

    CPU is in percent of one CPU. A pod's memory is its VM's share of the host's, OVERHEAD the part of it that
    is not its guest's. Keys: c, m, n sort by CPU, memory, name; q quits. Without a terminal one snapshot is
    printed. JSON output is one document for each snapshot.

    \b
    vcnode top
    vcnode top --sort memory --node host1
    vcnode top --once -o json | jq '.pods[0]'
    """
    from vcnode.cli.top_data import Gatherer
    from vcnode.client import Fleet

    live = sys.stdout.isatty() and not cli.json
    async with cli.client() as client, Fleet(client) as fleet:
        gatherer = Gatherer(fleet, node=cli.options.node, guests=not no_guest)
        if live and not once:
            await _live(gatherer, sort, interval, containers=not no_guest)
            return
        await gatherer.snapshot()
        wait_s = RATE_S
        while True:
            await asyncio.sleep(wait_s)
            await _print(cli, gatherer, sort.value, containers=not no_guest)
            if once or not cli.json:
                return
            wait_s = interval


async def _print(cli: Cli, gatherer: Gatherer, sort: SortKey, *, containers: bool) -> None:
    snapshot = (await gatherer.snapshot()).by(sort)
    if cli.json:
        print(json.dumps(snapshot.as_json()), flush=True)
        return
    from vcnode.cli import top_view
    from vcnode.cli.output import show_table

    show_table(top_view.NODE_HEADS, top_view.node_cells(snapshot.nodes))
    print()
    show_table(top_view.POD_HEADS, top_view.pod_cells(snapshot.pods))
    if containers:
        print()
        show_table(top_view.CONTAINER_HEADS, top_view.container_cells(snapshot.containers))


class _Keys:
    """What was typed."""

    def __init__(self, sort: Sort, end: Callable[[], object]) -> None:
        self.sort = sort
        self.quit = False
        self.pressed = asyncio.Event()
        """Set when another order is wanted."""
        self._end = end

    def leave(self) -> None:
        """Quit, whatever is being waited for."""
        if not self.quit:
            self.quit = True
            self._end()

    def read(self) -> None:
        """Take what there is on standard input; its end quits, too."""
        typed = os.read(sys.stdin.fileno(), 64)
        if not typed:
            self.leave()
        if typed.startswith(b"\x1b") and len(typed) > 1:
            return  # an arrow, or another key that sends several bytes
        for key in (typed[i : i + 1] for i in range(len(typed))):
            if key in QUIT:
                self.leave()
            elif (sort := KEYS.get(key)) is not None:
                self.sort = sort
                self.pressed.set()


@contextlib.contextmanager
def _listening(keys: _Keys) -> Iterator[None]:
    """Take keys as they are typed, without showing them, until the block ends, however it ends."""
    from vcnode.cli import terminal

    with contextlib.ExitStack() as stack:
        ends: dict[signal.Signals, Callable[[], object]] = dict.fromkeys(ENDS, keys.leave)
        stack.enter_context(terminal.signals(ends))
        if sys.stdin.isatty():
            stack.enter_context(terminal.cbreak())
            loop, fd = asyncio.get_running_loop(), sys.stdin.fileno()
            loop.add_reader(fd, keys.read)
            stack.callback(loop.remove_reader, fd)
        yield


async def _live(gatherer: Gatherer, sort: Sort, interval_s: float, *, containers: bool) -> None:
    from rich.live import Live

    from vcnode.cli import top_view
    from vcnode.cli.output import console

    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    keys = _Keys(sort, task.cancel if task is not None else lambda: None)
    out = console()
    try:
        with _listening(keys), Live(console=out, screen=True, auto_refresh=False) as shown:
            wait_s = min(RATE_S, interval_s)  # the first snapshot has no rates
            while True:
                snapshot = await gatherer.snapshot()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(loop.time() + wait_s):
                        while True:
                            keys.pressed.clear()
                            shown.update(
                                top_view.screen(
                                    snapshot.by(keys.sort.value),
                                    keys.sort.value,
                                    height=out.size.height,
                                    containers=containers,
                                ),
                                refresh=True,
                            )
                            await keys.pressed.wait()
                wait_s = interval_s
    except asyncio.CancelledError:
        if not keys.quit or task is None:
            raise
        task.uncancel()
