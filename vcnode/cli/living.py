"""What ``vcnode container wait`` and ``ps`` do."""

from __future__ import annotations

from vcnode.cli import specs
from vcnode.cli.command import Cli
from vcnode.cli.exits import Exit
from vcnode.cli.output import age, printable, show_table, size
from vcnode.errors import DeadlineExceededError
from vcnode.models.living import (
    MAX_PROCESSES,
    ContainerProcesses,
    ContainerProcessesOf,
    ContainerWait,
    ContainerWaited,
)

POLL_S = 60.0
"""Deadline of one request, so that a node agent that was killed meanwhile is asked again in time."""


async def wait(cli: Cli, pod_id: str, container_id: str, condition: str) -> int:
    """Wait, again and again where no limit was given; returns the exit code to end with."""
    wanted = specs.model(
        ContainerWait,
        {"pod_id": pod_id, "container_id": container_id, "condition": condition},
        "There is nothing like that to wait for.",
    )
    async with cli.node() as node:
        while True:
            try:
                reply = await node.container_wait(
                    wanted.pod_id,
                    wanted.container_id,
                    wanted.condition,
                    deadline_s=cli.options.deadline_s or POLL_S,
                )
                break
            except DeadlineExceededError:
                if cli.options.deadline_s is not None:
                    raise
    cli.show(reply, waited)
    if reply.condition != "exited" or reply.container is None or reply.container.exit_code is None:
        return Exit.OK
    return reply.container.exit_code


def waited(reply: ContainerWaited) -> None:
    """The exit code, or what has come true."""
    if reply.condition == "exited" and reply.container is not None:
        code = reply.container.exit_code
        print("unknown: its VM has ended" if code is None else code)
    else:
        print(f"{printable(f'{reply.pod_id}/{reply.container_id}')} is {reply.condition}")


async def ps(cli: Cli, pod_id: str, container_id: str, limit: int | None) -> None:
    """List processes."""
    wanted = specs.model(
        ContainerProcessesOf,
        {"pod_id": pod_id, "container_id": container_id, "limit": limit or MAX_PROCESSES},
        "The selection is not right.",
    )
    async with cli.node() as node:
        reply = await node.container_processes(
            wanted.pod_id, wanted.container_id, limit=wanted.limit, deadline_s=cli.options.deadline_s
        )
    cli.show(reply, processes)


def processes(reply: ContainerProcesses) -> None:
    """One line for each process."""
    show_table(
        ("PID", "USER", "STATE", "CPU", "MEMORY", "AGE", "COMMAND"),
        (
            (
                process.container_pid,
                process.user or process.uid,
                process.state,
                f"{process.cpu_ms / 1000:.2f} s",
                size(process.rss_bytes),
                age(process.started_at),
                " ".join(process.args) or f"[{process.name}]",
            )
            for process in reply.processes
        ),
    )
    if reply.total > len(reply.processes):
        print(f"… and {reply.total - len(reply.processes)} more")
