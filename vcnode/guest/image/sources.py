"""The Python sources that make an image what it is: the agent's, which go in, and the builder's own."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from pathlib import Path

from vcnode.guest.image.errors import GuestImageError
from vcnode.guest.image.manifest import digest_of

_PACKAGE = Path(__file__).parents[2]
"""The directory of the package ``vcnode``."""


def agent_sources() -> dict[str, bytes]:
    """The guest agent as installed here: path below the directory of ``vcnode``'s parent to content.

    Raises:
        GuestImageError: This installation has no sources.
    """
    guest = _PACKAGE / "guest"
    files = [_PACKAGE / "__init__.py", *sorted(guest.glob("*.py")), *sorted((guest / "agent").rglob("*.py"))]
    try:
        return {str(path.relative_to(_PACKAGE.parent)): path.read_bytes() for path in files}
    except OSError as exc:
        raise GuestImageError(f"The guest agent's source {exc.filename} cannot be read.") from exc


def agent_version(sources: Mapping[str, bytes]) -> str:
    """``__version__`` in the agent's ``vcnode/__init__.py``.

    Raises:
        GuestImageError: There is none.
    """
    try:
        tree = ast.parse(sources.get("vcnode/__init__.py", b""))
    except (SyntaxError, ValueError) as exc:
        raise GuestImageError("The agent's vcnode/__init__.py is not valid Python.") from exc
    for node in tree.body:
        match node:
            case ast.Assign([ast.Name("__version__")], ast.Constant(str(version))):
                return version
    raise GuestImageError("The agent's vcnode/__init__.py has no __version__.")


def sources_digest(sources: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents, hex."""
    return digest_of({path: hashlib.sha256(content).hexdigest() for path, content in sources.items()})


def builder_digest() -> str:
    """SHA-256 over the builder's own sources, hex: a changed builder makes another image."""
    return sources_digest({path.name: path.read_bytes() for path in Path(__file__).parent.glob("*.py")})
