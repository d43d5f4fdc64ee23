"""``vcnode secret``: values that only a guest is to see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vcnode.cli.command import Cli, command
from vcnode.cli.exits import Exit

app = typer.Typer(no_args_is_help=True, help="Secrets that only a guest sees.")


@app.callback()
def secret() -> None:
    """Secrets that only a guest sees."""


async def _seal(
    cli: Cli,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="X…", help="Seal for this key, such as a fleet's, and ask no node."),
    ] = None,
) -> None:
    """Seal what stands on standard input, for one node or for a key that several share.

    What is printed goes into a pod's spec, beside 'var' of a variable or 'name' of a file in 'secrets'. A
    newline at the end is sealed as well.

    \b
    printf %s "$PASSWORD" | vcnode secret seal --node host1
    vcnode secret seal --key XA… < tls.key
    """
    import base64
    import json

    from vcnode.cli.exits import UsageError
    from vcnode.models.secrets import MAX_SECRET_BYTES, Sealed
    from vcnode.models.xkeys import BadKeyError, CurveKey

    if key is None:
        async with cli.node() as node:
            keys = (await node.node_info()).xkeys
        if not keys:
            raise UsageError("The node is of a version of vcnode that opens no secrets.")
        key = keys[0]
    content = sys.stdin.buffer.read(MAX_SECRET_BYTES + 1)
    if len(content) > MAX_SECRET_BYTES:
        raise UsageError(f"A secret has at most {MAX_SECRET_BYTES} bytes.")
    sender = CurveKey.make()
    try:
        box = sender.seal(content, key)
    except BadKeyError as exc:
        raise UsageError(f"--key: {exc}") from exc
    sealed = Sealed(to=key, sender=sender.public, data=base64.b64encode(box).decode())
    print(json.dumps({"sealed": sealed.model_dump()}))


command(app, "seal")(_seal)


@app.command("key")
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to put it; must not exist.")],
) -> None:
    """Make a key that several nodes may share, and print its public half.

    Put the file on each node and name it in secrets.key_files.

    \b
    vcnode secret key /etc/vcnode/fleet.xkey
    """
    from vcnode.models.xkeys import CurveKey
    from vcnode.pods import keyring

    made = CurveKey.make()
    try:
        keyring.write(file, made)
    except OSError as exc:
        print(f"error: {file} cannot be made: {exc.strerror}", file=sys.stderr)
        sys.exit(Exit.FAILED)
    print(made.public)
