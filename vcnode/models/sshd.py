"""How the agent ``sshd`` reaches a guest."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from vcnode.models.base import Request
from vcnode.models.network import IpAddress
from vcnode.models.secrets import SecretPath

HostKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)) [A-Za-z0-9+/]+={0,2}$", max_length=4096
    ),
    Field(description="Public key of an SSH server: its type and the key in base64, as in `known_hosts`."),
]


class SshdConfig(Request):
    """How the agent ``sshd`` logs in to a guest."""

    username: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")] = "root"
    """As whom. Another than root becomes root by ``sudo``, which must ask for no password."""
    private_key_file: SecretPath | None = None
    """File on the host with the private key, for nobody else to read. Default: the node's own key, whose
    public half ``node.info`` tells (``notes`` of the agent)."""
    server: IpAddress | None = None
    """Address of the SSH server. Default: the first of the pod's network."""
    port: int = Field(default=22, ge=1, le=65535)
    """Its port."""
    host_key: HostKey | None = None
    """Key by which the server must prove itself. Default: the first that it shows is kept, and must stay: for
    the pod's life where its disk keeps what is written, else for that of its VM."""
