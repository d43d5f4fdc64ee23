"""``vcnode contracts``: the documents that describe what travels over the bus."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vcnode.cli.exits import Exit

app = typer.Typer(no_args_is_help=True, help="JSON Schemas and AsyncAPI document of all messages.")


@app.callback()
def contracts() -> None:
    """JSON Schemas and AsyncAPI document of all messages."""


@app.command("generate")
def generate(
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put them.")] = Path(
        "contracts"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail when what is there is out of date.")
    ] = False,
) -> None:
    """Write asyncapi.json and schemas/*.json as the models have them.

    \b
    vcnode contracts generate
    vcnode contracts generate --check
    vcnode contracts generate --out /tmp/contracts
    """
    from vcnode.contracts import documents

    if check:
        if found := documents.differences(out_dir):
            for line in found:
                print(line, file=sys.stderr)
            print("error: run 'vcnode contracts generate' and commit the result", file=sys.stderr)
            sys.exit(Exit.FAILED)
        print(f"{out_dir}: up to date, {len(documents.render())} documents")
        return
    try:
        changed = documents.write(out_dir)
    except OSError as exc:
        print(f"error: {exc.filename or out_dir} cannot be written: {exc.strerror}", file=sys.stderr)
        sys.exit(Exit.FAILED)
    print(f"{out_dir}: {len(changed)} of {len(documents.render())} documents changed")
