"""How each reply looks to people: which facts, in which order. Pure layout; `output` does the printing."""

from __future__ import annotations

from collections.abc import Iterable

from vcnode.cli.output import age, labels, printable, show_facts, show_table, size, state
from vcnode.models.commands import (
    ContainerDeleted,
    ContainerStatuses,
    ImageRemoved,
    ImageStatuses,
    PodDeleted,
    PodStatuses,
    PodStopped,
)
from vcnode.models.console import ConsoleText
from vcnode.models.network import Endpoint
from vcnode.models.node import DriverInfo, ImageStatus, NodeAudit, NodeInfo, NodePing
from vcnode.models.pod import ContainerState, ContainerStatus, OnDisconnect, PodStatus, StopOutcome
from vcnode.models.sessions import SessionClosed, Sessions
from vcnode.models.signals import MAX_NUMBER, signal_name

STOP_WORDS: dict[StopOutcome, str] = {
    "graceful": "it ended by itself",
    "forced": "its VM had to be killed",
    "absent": "nothing was running",
}


def pods(reply: PodStatuses) -> None:
    """One line for each pod."""
    show_table(
        ("POD", "STATE", "CONTAINERS", "VCPUS", "MEMORY", "AGE", "REASON"),
        (
            (
                pod.pod_id,
                state(pod.state),
                f"{sum(c.state is ContainerState.RUNNING for c in pod.containers)}/{len(pod.containers)}",
                pod.resources.vcpu_count,
                f"{pod.resources.mem_size_mib} MiB",
                age(pod.created_at),
                pod.reason,
            )
            for pod in reply.pods
        ),
    )


def _endpoints(status: PodStatus) -> tuple[Endpoint, ...]:
    return () if status.network is None else status.network.endpoints


def console(reply: ConsoleText) -> None:
    """What a guest wrote; the node has made its control characters harmless."""
    print(reply.text)


def pod(status: PodStatus) -> None:
    """All about one pod."""
    vm = status.hypervisor
    show_facts(
        (
            ("pod", status.pod_id),
            ("node", status.node),
            ("state", state(status.state)),
            ("ready", "yes" if status.ready else "no"),
            ("reason", status.reason),
            ("restarts", status.restart_count or None),
            ("restarts at", status.restart_at and status.restart_at.isoformat(timespec="seconds")),
            ("mock", "yes: no VM exists" if status.mock else None),
            ("without NATS", on_disconnect(status.on_disconnect)),
            ("size", f"{status.resources.vcpu_count} vCPU, {status.resources.mem_size_mib} MiB"),
            ("memory now", _resized(status)),
            ("hostname", status.hostname),
            ("vm", vm and f"{vm.vm_id} ({vm.type}{f', {vm.accelerator}' if vm.accelerator else ''})"),
            ("pid", vm and vm.pid),
            ("agent", status.agent_type),
            ("network", status.network_model),
            ("addresses", ", ".join(a for e in _endpoints(status) for a in e.addresses)),
            ("created", status.created_at.isoformat(timespec="milliseconds")),
            ("started", status.started_at and status.started_at.isoformat(timespec="milliseconds")),
            ("finished", status.finished_at and status.finished_at.isoformat(timespec="milliseconds")),
            ("start took", phases(status.phases_ms)),
            ("volumes", ", ".join(f"{v.mount_tag} ({v.host_path or v.device})" for v in status.volumes)),
            ("sockets", ", ".join(f"{s.name} ({s.host_path})" for s in status.sockets)),
            ("labels", labels(status.labels)),
            ("annotations", labels(status.annotations)),
            ("left over", "; ".join(status.leftovers)),
            ("revision", status.revision),
        )
    )
    if status.containers:
        print()
        containers_table(status.containers)


def on_disconnect(rule: OnDisconnect) -> str | None:
    """What becomes of a pod without NATS; None when it goes on."""
    return None if rule.after_s is None else f"{rule.action} after {rule.after_s:g} s"


def _resized(status: PodStatus) -> str | None:
    """The pod's memory, where that is not its VM's."""
    if status.mem_size_mib in (0, status.resources.mem_size_mib):
        return None
    return f"{status.mem_size_mib} MiB"


def pod_stopped(reply: PodStopped) -> None:
    """How a stop went, and the pod afterwards."""
    print(f"{reply.pod.pod_id} is {reply.pod.state} ({STOP_WORDS[reply.outcome]})")


def pod_deleted(reply: PodDeleted) -> None:
    """Whether there was something to delete."""
    print(f"{printable(reply.pod_id)} {'deleted' if reply.existed else 'did not exist'}")


def container_deleted(reply: ContainerDeleted) -> None:
    """Whether there was something to delete."""
    name = printable(f"{reply.pod_id}/{reply.container_id}")
    print(f"{name} {'deleted' if reply.existed else 'did not exist'}")


def _there(attached: bool) -> str:
    return "there" if attached else "gone"


def sessions(reply: Sessions) -> None:
    """One line for each session."""
    show_table(
        ("POD", "CONTAINER", "KIND", "CLIENT", "AGE", "COMMAND ID"),
        (
            (
                s.pod_id,
                s.container_id,
                s.kind,
                _there(s.attached),
                age(s.opened_at),
                s.command_id,
            )
            for s in reply.sessions
        ),
    )


def session_closed(reply: SessionClosed) -> None:
    """Whether there was something to close."""
    print("closed" if reply.existed else "there was no such session")


def image_removed(reply: ImageRemoved) -> None:
    """Whether there was something to remove."""
    print(f"{printable(reply.name)} {'removed' if reply.existed else 'did not exist'}")


def phases(phases_ms: dict[str, float]) -> str:
    """The phases of a start on one line, the total first."""
    total = phases_ms.get("total")
    parts = ", ".join(f"{name} {ms:.0f}" for name, ms in phases_ms.items() if name != "total")
    if total is None:
        return parts and f"{parts} ms"
    return f"{total:.0f} ms" + (f" ({parts})" if parts else "")


def containers(reply: ContainerStatuses) -> None:
    """One line for each container."""
    containers_table(reply.containers)


def containers_table(statuses: Iterable[ContainerStatus]) -> None:
    """The table behind `containers`."""
    show_table(
        ("POD", "CONTAINER", "STATE", "EXIT", "ROOT", "AGE", "REASON"),
        (
            (
                status.pod_id,
                status.container_id,
                state(status.state),
                exit_words(status.exit_code),
                status.image or status.rootfs,
                age(status.created_at),
                "out of memory" if status.oom_killed else status.reason,
            )
            for status in statuses
        ),
    )


def exit_words(exit_code: int | None) -> str | None:
    """An exit code, with the signal that it stands for."""
    if exit_code is None:
        return None
    number = exit_code - 128
    return f"{exit_code} ({signal_name(number)})" if 1 <= number <= MAX_NUMBER else str(exit_code)


def container(status: ContainerStatus) -> None:
    """All about one container."""
    show_facts(
        (
            ("pod", status.pod_id),
            ("container", status.container_id),
            ("state", state(status.state)),
            ("ready", "yes" if status.ready else "no"),
            ("exit code", exit_words(status.exit_code)),
            ("restarts", status.restart_count or None),
            ("restarts at", status.restart_at and status.restart_at.isoformat(timespec="seconds")),
            ("reason", "out of memory" if status.oom_killed else status.reason),
            ("pid in guest", status.pid),
            ("image", status.image),
            ("digest", status.image_digest),
            ("disk", status.disk_size_mib and f"{status.disk_size_mib} MiB"),
            ("rootfs", status.rootfs),
            ("created", status.created_at.isoformat(timespec="milliseconds")),
            ("started", status.started_at and status.started_at.isoformat(timespec="milliseconds")),
            ("finished", status.finished_at and status.finished_at.isoformat(timespec="milliseconds")),
            ("labels", labels(status.labels)),
            ("annotations", labels(status.annotations)),
        )
    )


def images(reply: ImageStatuses) -> None:
    """One line for each image."""
    show_table(
        ("IMAGE", "DIGEST", "SIZE", "AGE", "IN USE"),
        (
            (
                image.name,
                image.digest[:19],
                size(image.size_bytes),
                age(image.imported_at),
                "yes" if image.in_use else "no",
            )
            for image in reply.images
        ),
    )


def image(status: ImageStatus) -> None:
    """All about one image."""
    show_facts(
        (
            ("image", status.name),
            ("digest", status.digest),
            ("size", size(status.size_bytes)),
            ("imported", status.imported_at.isoformat(timespec="seconds")),
            ("in use", "yes" if status.in_use else "no"),
            ("reference", status.reference or "imported"),
            ("command", " ".join((*status.config.entrypoint, *status.config.cmd))),
        )
    )


def pings(replies: Iterable[NodePing]) -> None:
    """One line for each node that answered."""
    show_table(
        ("NODE", "VERSION", "EPOCH", "TIME", "MOCK"),
        (
            (
                ping.node,
                ping.version,
                ping.epoch,
                ping.time.isoformat(timespec="seconds"),
                "yes" if ping.mock else "no",
            )
            for ping in replies
        ),
    )


def node(info: NodeInfo) -> None:
    """All about one node."""
    show_facts(
        (
            ("node", info.node),
            ("state", state(info.state)),
            ("version", info.version),
            ("epoch", info.epoch),
            ("up since", info.started_at.isoformat(timespec="seconds")),
            ("mock", "yes: no VM will run" if info.mock else None),
            ("accelerator", info.accelerator),
            ("cpus", info.cpu_count),
            ("memory", f"{info.mem_available_mib} of {info.mem_total_mib} MiB available"),
            ("pods", f"{info.pod_count}, {info.running_pod_count} running"),
            ("defaults", f"{info.default_hypervisor}, {info.default_agent}, {info.default_network}"),
            ("allowed roots", ", ".join(info.allowed_roots)),
        )
    )
    print()
    show_table(("DRIVER", "TYPE", "VERSION", "CAPABILITIES", "NOTES"), _drivers(info))


def audit(reply: NodeAudit) -> None:
    """What the node holds, orphans first, and what could not be seen or removed."""
    show_table(
        ("KIND", "NAME", "VM", "POD", "ORPHAN"),
        (
            (
                held.kind,
                held.name,
                held.vm_id,
                held.pod_id,
                ("removed" if held.freed else "yes") if held.orphan else None,
            )
            for held in sorted(reply.holdings, key=lambda held: not held.orphan)
        ),
    )
    print(f"{len(reply.holdings)} held, {reply.orphan_count} of them nobody's ({reply.freed_count} removed)")
    for problem in reply.problems:
        print(printable(problem))


def _drivers(info: NodeInfo) -> Iterable[tuple[object, ...]]:
    groups: tuple[tuple[str, tuple[DriverInfo, ...]], ...] = (
        ("hypervisor", info.hypervisors),
        ("agent", info.agents),
        ("network", info.networks),
    )
    for kind, drivers in groups:
        for driver in drivers:
            yield kind, driver.type, driver.version, ", ".join(driver.capabilities), "; ".join(driver.notes)
