"""Names of what the bridge driver makes: all carry the node's mark, and tell the VM they are for. Pure."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence

from vcnode.errors import FailedPreconditionError
from vcnode.models.vm import NetworkAttachment

_MARK_PREFIX = "vm-"
TABLE_PREFIX = "vcnode-"
"""How the names of the nftables tables of all node agents begin."""
HOST_INTERFACES = string.digits + string.ascii_lowercase.replace("b", "")  # vb-… is a bridge
"""Second characters of names at the host's end: the interface's number, or a letter if that is taken."""


def bridge(mark: str, network: str | None) -> str:
    """The bridge of a network; None: the node's own."""
    own = f"vb-{mark.removeprefix(_MARK_PREFIX)}"
    return own if network is None else f"{own}-{hashlib.sha256(network.encode()).hexdigest()[:6]}"


def check_networks(mark: str, wanted: Sequence[str], held: Sequence[NetworkAttachment]) -> None:
    """See that none of the networks would get the bridge of another one, whose pods it would reach.

    Names are made of 24 bits of a digest, so this happens by bad luck once in 16 million, or by intent.

    Raises:
        FailedPreconditionError: One would.
    """
    known = {e.network for attachment in held for e in attachment.endpoints if e.network is not None}
    owners: dict[str, str] = {bridge(mark, network): network for network in known}
    for network in wanted:
        if (other := owners.setdefault(bridge(mark, network), network)) != network:
            raise FailedPreconditionError(
                f"pod.network.networks: {network} cannot be told from network {other} in the name of its "
                "bridge; choose another name.",
                field="pod.network.networks",
            )


def bridges(mark: str) -> str:
    """How the names of all bridges of the node begin."""
    return f"vb-{mark.removeprefix(_MARK_PREFIX)}"


def bridge_mac(name: str) -> str:
    """The MAC of a bridge: its own, so that it does not change with its ports."""
    digest = hashlib.sha256(name.encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def table(mark: str) -> str:
    """The nftables table of the node."""
    return f"{TABLE_PREFIX}{mark.removeprefix(_MARK_PREFIX)}"


def host_interface(vm_id: str, character: str) -> str:
    """An interface of a VM at the host's end; as long as the VM's id, which fits."""
    return f"v{character}-{vm_id.removeprefix(_MARK_PREFIX)}"


def vm_of(interface: str, mark: str) -> str | None:
    """The VM that an interface at the host's end is for; None when it is none of this node's."""
    rest = interface[3:]
    own = mark.removeprefix(_MARK_PREFIX)
    if interface[:1] == "v" and interface[1:2] in HOST_INTERFACES and interface[2:3] == "-":
        return f"{_MARK_PREFIX}{rest}" if rest.startswith(own) and len(rest) > len(own) else None
    return None
