"""Name resolution of pods: what was asked for, completed from the node's settings and the host's own."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from vcnode.models.network import DnsConfig

RESOLV_CONF = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf"))
"""systemd-resolved's real servers before the file that may lead to its stub on the loopback."""
MAX_SERVERS = 3
"""More are ignored by resolvers. Source: resolv.conf(5)."""


def complete(asked: DnsConfig, of_node: Sequence[str]) -> DnsConfig:
    """What a pod gets: its own servers, else the node's, else those of the host that a pod can reach."""
    if asked.servers:
        return asked
    if of_node:
        return asked.model_copy(update={"servers": tuple(of_node)})
    for path in RESOLV_CONF:
        try:
            found = parse(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if found.servers:
            search = asked.search or found.search
            return asked.model_copy(update={"servers": found.servers, "search": search})
    return asked


def parse(text: str) -> DnsConfig:
    """The servers in a resolv.conf that are not on the host's own loopback, and its domains."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            try:
                address = ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            if not (address.is_loopback or address.is_link_local or address.is_unspecified):
                servers.append(str(address))
        elif words[:1] == ["search"]:
            search = tuple(words[1:7])
    return DnsConfig.model_construct(
        servers=tuple(servers[:MAX_SERVERS]), search=search, options=(), hosts={}
    )
