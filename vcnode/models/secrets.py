"""Values that nobody but the guest is to see: sealed for a node, or in a file on its host."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import Request

MAX_SECRET_BYTES = 64 * 1024
"""Longest value."""
MAX_SECRETS = 64
"""Most files of one container."""


class HostSecret:
    """Marks a text that names a file with a secret on the host, for which policy has directories."""


XKey = Annotated[
    str,
    StringConstraints(pattern=r"^X[A-Z2-7]{55}$"),
    Field(description="Public curve key of NATS (xkey)."),
]
SecretPath = Annotated[
    str,
    StringConstraints(pattern=r"^/[^\x00]{0,4094}$"),
    Field(description="Absolute path of a file on the node's host, below one of `policy.secret_dirs`."),
    HostSecret(),
]


class Sealed(Request):
    """A value that one node, or all that share a key, can open: ``vcnode secret seal`` makes it, or any nkeys
    library of NATS."""

    to: XKey
    """For whom: a key of ``node.info``'s ``xkeys``."""
    sender: XKey
    """Who sealed it: the public half of the key that was used, which may be made for this one value."""
    data: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=96 * 1024)]
    """The box (``xkv1``, nonce, NaCl box) in base64."""


def check_one(given: dict[str, object]) -> None:
    """See that exactly one of the ways to give a value is used. Raises ValueError."""
    if sum(value is not None for value in given.values()) != 1:
        names = [repr(name) for name in given]
        raise ValueError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}")


class SecretFile(Request):
    """A file in a container's ``/run/secrets``, which is kept in the guest's memory and read-only."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
    """Its name there."""
    sealed: Sealed | None = None
    """Its content, sealed."""
    file: SecretPath | None = None
    """Its content is that of this file on the host, as it is when the container is made in its guest."""
    mode: int = Field(default=0o444, ge=0, le=0o777)
    """Its permissions, as a number; its owner is root."""

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        check_one({"sealed": self.sealed, "file": self.file})
        return self
