"""How ``vcnode top`` looks: three tables, cut to the height of the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from vcnode.cli.output import cell, make_table, size, state
from vcnode.cli.top_data import ContainerRow, NodeRow, PodRow, Snapshot, SortKey

NODE_HEADS = ("NODE", "STATE", "PODS", "VCPUS", "MEMORY MIB", "CPU", "MEMORY")
POD_HEADS = ("NODE", "POD", "STATE", "CPU", "MEMORY", "OVERHEAD", "SIZE", "NET IN", "NET OUT", "DISK")
CONTAINER_HEADS = ("NODE", "POD", "CONTAINER", "STATE", "CPU", "MEMORY", "LIMIT", "PIDS", "DISK")
_NODE_SHARE = 4
"""Nodes get a fourth of the lines at most; of the rest pods get half at most, unless containers need less."""
_FRAME_LINES = 2
"""Head of a table and the blank line behind it."""


def percent(value: float | None) -> str:
    """CPU; 100 is one CPU."""
    return "-" if value is None else f"{value:.1f}%"


def amount(value: float | None, unit: str = "") -> str:
    """Bytes, or bytes in some time."""
    return "-" if value is None else f"{size(int(value))}{unit}"


def node_cells(rows: Iterable[NodeRow]) -> list[tuple[object, ...]]:
    """One line for each node."""
    return [
        (
            row.node,
            state(row.state),
            f"{row.pods}/{row.max_pods}",
            f"{row.vcpus}/{row.max_vcpus}",
            f"{row.mem_mib}/{row.max_mem_mib}",
            percent(row.cpu_percent),
            amount(row.memory_bytes),
        )
        for row in rows
    ]


def pod_cells(rows: Iterable[PodRow]) -> list[tuple[object, ...]]:
    """One line for each pod."""
    return [
        (
            row.node,
            row.pod_id,
            state(row.state),
            percent(row.cpu_percent),
            amount(row.memory_bytes),
            amount(row.overhead_bytes),
            amount(row.mem_size_bytes),
            amount(row.received_bytes_per_s, "/s"),
            amount(row.sent_bytes_per_s, "/s"),
            amount(row.disk_bytes_per_s, "/s"),
        )
        for row in rows
    ]


def container_cells(rows: Iterable[ContainerRow]) -> list[tuple[object, ...]]:
    """One line for each container."""
    return [
        (
            row.node,
            row.pod_id,
            row.container_id,
            state(row.state),
            percent(row.cpu_percent),
            amount(row.memory_bytes),
            amount(row.limit_bytes),
            row.pids,
            amount(row.disk_bytes_per_s, "/s"),
        )
        for row in rows
    ]


def shares(lines: int, nodes: int, pods: int, containers: int) -> tuple[int, int, int]:
    """Rows of each table that fit into so many lines."""
    for_nodes = min(nodes, max(1, lines // _NODE_SHARE))
    left = max(0, lines - for_nodes)
    for_pods = min(pods, max(left // 2, left - containers))
    return for_nodes, for_pods, min(containers, max(0, left - for_pods))


def screen(snapshot: Snapshot, sort: SortKey, *, height: int, containers: bool) -> RenderableType:
    """A whole screen."""
    tables = 3 if containers else 2
    counts = shares(
        height - 1 - tables * _FRAME_LINES,
        len(snapshot.nodes),
        len(snapshot.pods),
        len(snapshot.containers) if containers else 0,
    )
    running = sum(pod.state == "running" for pod in snapshot.pods)
    head = Text(
        f"vcnode top  {snapshot.time:%H:%M:%S} UTC  {len(snapshot.nodes)} nodes, {running} pods running"
        f"  by {sort}  (c cpu, m memory, n name, q quit)",
        style="bold",
        no_wrap=True,
        overflow="ellipsis",
    )
    parts: list[RenderableType] = [head]
    sections: list[tuple[Sequence[str], list[tuple[object, ...]], int]] = [
        (NODE_HEADS, node_cells(snapshot.nodes), counts[0]),
        (POD_HEADS, pod_cells(snapshot.pods), counts[1]),
    ]
    if containers:
        sections.append((CONTAINER_HEADS, container_cells(snapshot.containers), counts[2]))
    for heads, cells, count in sections:
        parts += [cell(" "), make_table(heads, cells[:count])]
    return Group(*parts)
