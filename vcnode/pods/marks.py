"""The node's mark: by it a node knows what it has made on the host, and leaves alone what it has not."""

from __future__ import annotations

import hashlib
import os
import secrets

from vcnode.settings import Settings

_MARK_DIGITS = 5
_RANDOM_DIGITS = 7


def mark_of(settings: Settings) -> str:
    """How the ids of all VMs of this node begin.

    It follows from name and state directory, which no two node agents on one host share (see
    `vcnode.node.state_lock`), so it outlives a lost database, and nodes may share a ``run_dir``.
    """
    identity = f"{settings.node_name}\0{os.path.realpath(settings.state_dir)}"
    return f"vm-{hashlib.sha256(identity.encode()).hexdigest()[:_MARK_DIGITS]}"


def new_vm_id(settings: Settings) -> str:
    """An id for a new VM or disk of this node; 15 characters: it fits an interface's name and a serial."""
    return f"{mark_of(settings)}{secrets.token_hex(_RANDOM_DIGITS)[:_RANDOM_DIGITS]}"
