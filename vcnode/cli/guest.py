"""``vcnode guest``: the guest image that all VMs of a node boot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vcnode.guest.image.progress import Progress, Report

app = typer.Typer(no_args_is_help=True, help="The guest image: kernel and initramfs of all VMs.")


@app.callback()
def guest() -> None:
    """The guest image: kernel and initramfs of all VMs."""


@app.command("build")
def build(
    out_dir: Annotated[
        Path, typer.Option("--out", envvar="VCNODE_GUEST_DIR", metavar="DIR", help="Where to put it.")
    ] = Path("/var/lib/vcnode/guest"),
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Where packages are kept; else the system's cache."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even when nothing has changed.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
) -> None:
    """Build the guest image from this host's Debian or Ubuntu packages, if any of its inputs changed.

    \b
    vcnode guest build
    vcnode guest build --out ./guest
    """
    from vcnode.cli.exits import Exit
    from vcnode.guest import image

    try:
        with _reporting() as report:
            built = image.build(
                out_dir.absolute(),
                cache_dir=cache_dir or image.default_cache_dir(),
                progress=report,
                force=force,
                offline=offline,
            )
    except image.GuestImageError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(Exit.FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(Exit.INTERRUPTED)
    print(f"{built.directory}: kernel {built.kernel_release}, {built.digest}")


@contextmanager
def _reporting() -> Iterator[Report]:
    """Progress as a bar on a terminal, as a line for each step elsewhere."""
    from vcnode.cli.output import console

    out = console(error=True)
    if not out.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.fields[step]:<9}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Bars(*columns, console=out, transient=True) as bars:
        bar = bars.add_task("", step="", text="")

        def report(progress: Progress) -> None:
            bars.update(
                bar, step=progress.step, text=progress.text, completed=progress.done, total=progress.total
            )

        yield report


class _Lines:
    """Prints a line when a step begins."""

    def __init__(self) -> None:
        self._step = ""

    def __call__(self, progress: Progress) -> None:
        if progress.step != self._step:
            self._step = progress.step
            print(f"{progress.step}: {progress.text}".rstrip(": "), file=sys.stderr, flush=True)
