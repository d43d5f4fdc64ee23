"""The node's nftables table: masquerading, published ports, and who may come in. Rules are pure text.

All of it is in one table of the node's own, which is replaced as a whole; a published port is an element of a
map. Loaded by ``nft -f -`` in one transaction: pyroute2 cannot write rules.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vcnode import aio
from vcnode.drivers.exhaustion import exhausted
from vcnode.drivers.network.ipam import Subnets
from vcnode.errors import FailedPreconditionError, NetworkError
from vcnode.models.network import NetworkConfig
from vcnode.models.vm import NetworkAttachment

MAPS = {("tcp", 4): "tcp4", ("tcp", 6): "tcp6", ("udp", 4): "udp4", ("udp", 6): "udp6"}


@dataclass(frozen=True, slots=True)
class Published:
    """A published port as the table has it."""

    map: str
    """One of `MAPS`."""
    port: int
    """On the host."""
    vm_id: str
    """VM that it is for."""


def base(table: str, bridges: str, subnets: Subnets, *, masquerade: bool) -> str:
    """The table without ports.

    Args:
        table: Its name.
        bridges: How the names of the node's bridges begin.
        subnets: Of the pods.
        masquerade: Whether what pods send to the outside gets the host's address.
    """
    ours = f'"{bridges}*"'
    lines = [f"table inet {table}", f"delete table inet {table}", f"table inet {table} {{"]
    for (_, version), name in MAPS.items():
        kind = "ipv4_addr" if version == 4 else "ipv6_addr"
        lines.append(f"  map {name} {{ type inet_service : {kind} . inet_service; }}")
    to_pods = [
        f"fib daddr type local dnat {'ip' if version == 4 else 'ip6'} to {protocol} dport map @{name}"
        for (protocol, version), name in MAPS.items()
    ]
    lines += _chain("prerouting", "type nat hook prerouting priority dstnat", to_pods)
    local = [
        f"ip daddr != 127.0.0.0/8 {rule}" if " ip to" in rule else f"ip6 daddr != ::1 {rule}"
        for rule in to_pods
    ]
    lines += _chain("output", "type nat hook output priority -100", local)
    leaving = [f"iifname {ours} oifname {ours} ct status dnat masquerade"]
    if masquerade:
        leaving += [
            f"{'ip' if subnet.version == 4 else 'ip6'} saddr {subnet} oifname != {ours} masquerade"
            for subnet in subnets.all
        ]
    lines += _chain("postrouting", "type nat hook postrouting priority srcnat", leaving)
    lines += _chain(
        "forward",
        "type filter hook forward priority filter",
        [
            f"oifname != {ours} accept",
            f"iifname {ours} accept",  # between pods: what may not pass has not left its namespace
            "ct status dnat accept",
            "ct state established,related accept",
            "drop",
        ],
    )
    return "\n".join([*lines, "}", ""])


def _chain(name: str, hook: str, rules: Iterable[str]) -> list[str]:
    return [f"  chain {name} {{", f"    {hook};", *(f"    {rule};" for rule in rules), "  }"]


def publish(table: str, attachment: NetworkAttachment) -> str:
    """Commands that publish the ports of an attachment; empty when it has none."""
    return "".join(
        f'add element inet {table} {name} {{ {port} comment "{attachment.vm_id}" : {address} . {inner} }}\n'
        for name, port, address, inner in _elements(attachment)
    )


def withdraw(table: str, published: Iterable[Published]) -> str:
    """Commands that take ports back."""
    return "".join(f"delete element inet {table} {p.map} {{ {p.port} }}\n" for p in published)


def _elements(attachment: NetworkAttachment) -> Iterable[tuple[str, int, str, int]]:
    addresses = attachment.endpoints[0].addresses if attachment.endpoints else ()
    for mapping in attachment.config.ports:
        for address in (ipaddress.ip_interface(text).ip for text in addresses):
            yield MAPS[mapping.protocol, address.version], mapping.host, str(address), mapping.container


def check_published(config: NetworkConfig, published: Iterable[Published], table: str) -> None:
    """See that none of the ports is one of those that another node agent's *table* has published.

    Raises:
        FailedPreconditionError: One is.
    """
    taken = {(p.port, p.map[:3]) for p in published}
    for index, mapping in enumerate(config.ports):
        if (mapping.host, mapping.protocol) in taken:
            field = f"pod.network.ports[{index}].host"
            raise FailedPreconditionError(
                f"{field}: {mapping.protocol} port {mapping.host} is published by another node agent of this "
                f"host (nftables table {table}); publish another port.",
                field=field,
            )


def parse(listing: str) -> list[Published]:
    """The published ports in what ``nft -j list table`` says."""
    maps = [entry["map"] for entry in json.loads(listing).get("nftables", ()) if "map" in entry]
    return [_published(held["name"], element[0]) for held in maps for element in held.get("elem", ())]


def _published(name: str, key: Any) -> Published:
    """An element's key: a number, or with its comment an object."""
    element = key["elem"] if isinstance(key, dict) else {"val": key}
    return Published(name, int(element["val"]), str(element.get("comment", "")))


class Nft:
    """The program nft, in the node agent's own namespace.

    Args:
        program: Its path.
    """

    def __init__(self, program: str) -> None:
        self._program = program

    @classmethod
    def find(cls) -> Nft | None:
        """It, if it is installed."""
        program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
        return None if program is None else cls(program)

    async def load(self, commands: str, *, timeout_s: float) -> None:
        """Carry out *commands* in one transaction. Raises NetworkError; nothing has changed then."""
        if commands:
            await self._run(["-f", "-"], commands, timeout_s=timeout_s)

    async def check(self, commands: str, *, timeout_s: float) -> None:
        """See that the kernel would carry out *commands*; nothing changes. Raises NetworkError."""
        await self._run(["-c", "-f", "-"], commands, timeout_s=timeout_s)

    async def published(self, table: str, *, timeout_s: float) -> list[Published]:
        """The published ports of a table; none when there is no such table. Raises NetworkError."""
        if table not in await self.tables(table, timeout_s=timeout_s):
            return []
        return parse(await self._run(["-j", "list", "table", "inet", table], "", timeout_s=timeout_s))

    async def tables(self, prefix: str, *, timeout_s: float) -> list[str]:
        """Names of the tables that begin so. Raises NetworkError."""
        listing = json.loads(await self._run(["-j", "list", "tables"], "", timeout_s=timeout_s))
        names = [entry["table"]["name"] for entry in listing["nftables"] if "table" in entry]
        return [name for name in names if name.startswith(prefix)]

    async def drop(self, table: str, *, timeout_s: float) -> None:
        """Remove a table. Idempotent. Raises NetworkError."""
        await self.load(f"table inet {table}\ndelete table inet {table}\n", timeout_s=timeout_s)

    async def _run(self, arguments: Sequence[str], text: str, *, timeout_s: float) -> str:
        late = NetworkError(f"nft has not answered within {timeout_s:g} s.")
        try:
            process = await asyncio.create_subprocess_exec(
                self._program,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as exc:
            raise exhausted(exc) or NetworkError(f"{self._program} could not be executed.") from exc
        try:
            async with aio.deadline_as(timeout_s, lambda: late):
                out, err = await process.communicate(text.encode())
        except BaseException:
            if process.returncode is None:
                process.kill()
                await aio.finish(process.wait(), timeout_s=timeout_s)
            raise
        if process.returncode:
            words = err.decode(errors="replace").strip().splitlines()
            raise NetworkError(f"nftables refused a change: {words[0] if words else process.returncode}.")
        return out.decode(errors="replace")
