"""The Protocols behind which all drivers stand.

Promises that hold for every driver:

- A failed or cancelled call that makes something leaves nothing of it behind.
- A call that removes something succeeds when it is already gone, and can be repeated.
- Every call takes ``timeout_s`` (seconds, keyword only) and honours it.
- Only `vcnode.errors` come out, and ``CancelledError`` unwrapped.
- What a driver cannot do it leaves out of ``info.capabilities`` and answers with `UnsupportedError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from vcnode.models.hypervisor import DiskFormat, HypervisorConfig
from vcnode.models.image import ImageConfig, PullProgress
from vcnode.models.living import ContainerProcess
from vcnode.models.network import Endpoint, NetworkConfig
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, ContainerResources, Resources, StopOutcome
from vcnode.models.stats import ContainerStats, GuestStats, VmStats
from vcnode.models.vm import (
    Channel,
    Disk,
    DiskFile,
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestInfo,
    GuestProcess,
    NetworkAttachment,
    NetworkRequest,
    Port,
    VmExit,
    VmRecord,
    VmShape,
    VmSpec,
    Watchdog,
)


class Vm(Protocol):
    """A VM that was launched or found again; its driver's handle."""

    @property
    def record(self) -> VmRecord:
        """What finds it again after a restart of the node agent."""
        ...

    def channel(self, channel_id: str) -> Path:
        """UNIX socket that leads to a serial port of the guest (`VmSpec.channels`). One client at a time."""
        ...

    @property
    def restore_s(self) -> float | None:
        """Seconds that resuming from a template took; None when it was booted or found again."""
        ...

    @property
    def paused(self) -> bool:
        """Whether its vCPUs are stopped, as far as is known; a VM that was found again has been asked."""
        ...

    async def wait(self) -> VmExit:
        """Wait until the VM is gone and say how it ended. May be awaited by several, and again."""
        ...

    async def attach_disk(self, disk: Disk, *, timeout_s: float) -> None:
        """Plug *disk* into the running VM; the guest finds it by its serial, ``disk.disk_id``.

        Raises:
            HypervisorError: QEMU refused, or is gone; nothing stays attached.
            NotFoundError: The file does not exist.
        """
        ...

    async def detach_disk(self, disk_id: str, *, timeout_s: float) -> None:
        """Unplug a disk; succeeds if it is not there. The guest must have let go of it before."""
        ...

    async def attach_port(self, port: Port, *, timeout_s: float) -> None:
        """Plug a serial port into the running VM; it stays until the VM ends. The caller keeps ``port.fd``.

        Raises:
            HypervisorError: QEMU refused (all ports are taken, among the reasons), or is gone.
        """
        ...

    async def pause(self, *, timeout_s: float) -> None:
        """Stop the vCPUs. Idempotent."""
        ...

    async def resume(self, *, timeout_s: float) -> None:
        """Let the vCPUs run again. Idempotent."""
        ...

    async def read_console(self, max_bytes: int, *, timeout_s: float) -> str:
        """The last *max_bytes* of what the guest wrote to its console, as far as it is kept.

        Characters that could do anything to a terminal are replaced.
        """
        ...

    async def set_memory(self, mem_size_mib: int, *, timeout_s: float) -> None:
        """Let the guest have so much memory, at most what the VM was launched with; returns when it is so.

        After an error the guest has something between before and now: call it again with either.

        Raises:
            UnsupportedError: It was launched without ``balloon``.
            FailedPreconditionError: The guest did not give back enough within *timeout_s*; says how much.
        """
        ...

    async def stop(self, *, grace_s: float) -> StopOutcome:
        """End the VM: wait up to *grace_s* for its power-off, then QMP quit, SIGTERM, SIGKILL, each bounded.

        Idempotent. On return, and on any error, no process and no socket of this VM is left; its directory
        stays. Cancellation: finishes the kill first, then propagates.

        Raises:
            HypervisorError: The process survived SIGKILL.
        """
        ...

    async def close(self) -> None:
        """Let go of the VM without ending it (the node agent is going down). Idempotent."""
        ...


class Measurable(Protocol):
    """A `Vm` that tells what it takes of its host; its hypervisor declares the capability ``stats``."""

    async def read_stats(
        self, *, mem_size_mib: int, interfaces: Mapping[str, str], memory: bool, timeout_s: float
    ) -> VmStats:
        """What the VM has used so far, by the host's own counting; the guest is not woken.

        Args:
            mem_size_mib: The guest's memory, by which its part of QEMU's is told from the rest.
            interfaces: The pod's interfaces in the VM's network namespace, and their names in the guest.
            memory: Whether proportional shares and overhead are wanted, for which every page is looked at.
            timeout_s: Limit of all of it.

        Raises:
            HypervisorError: The VM is gone.
        """
        ...


class Hypervisor(Protocol):
    """Launches VMs and finds them again."""

    @property
    def info(self) -> DriverInfo:
        """Version, capabilities and findings; complete after ``open``."""
        ...

    @property
    def accelerator(self) -> str | None:
        """``kvm`` or ``tcg`` once probed; None for the mock."""
        ...

    async def open(self) -> None:
        """Probe what the host can do. Raises HypervisorError when no VM could ever run, saying what to do."""
        ...

    def check(self, config: HypervisorConfig, resources: Resources) -> None:
        """See that it can build such a VM on this host, as far as that is known before. Pure.

        Raises:
            UnsupportedError: It cannot; says what it can.
            InvalidArgumentError: Something is missing or does not fit; names the field, from ``pod.`` on.
        """
        ...

    async def launch(self, spec: VmSpec, *, timeout_s: float) -> Vm:
        """Start a VM; returns once its process runs and QMP answers (the guest may still be booting).

        Raises:
            HypervisorError: It did not start; nothing of it is left but ``spec.directory``.
        """
        ...

    async def recover(self, record: VmRecord, *, timeout_s: float) -> Vm | None:
        """Take a VM over again after a restart; None when that very VM (pid, start time, uuid) is gone.

        Raises:
            HypervisorError: It is alive but does not answer.
        """
        ...

    async def kill(self, record: VmRecord, *, timeout_s: float) -> bool:
        """End the VM of *record* without a session, if it lives; True when something was killed.

        Idempotent; never touches a process whose identity does not match.
        """
        ...

    async def close(self) -> None:
        """Free what the driver itself holds; VMs go on. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """A template that a hypervisor keeps."""

    key: str
    used_bytes: int
    """On disk; in use it takes about as much memory, once for all its clones."""
    idle_s: float = 0.0
    """Seconds since it was last used."""


class Templating(Protocol):
    """A `Hypervisor` that can start VMs as copies of a booted one; declares the capability ``templates``.

    ``launch`` of a spec with ``clone_of`` resumes such a copy instead of booting; it raises `HypervisorError`
    when the template is missing or broken, and a broken one is dropped then.
    """

    def template_key(self, shape: VmShape) -> str:
        """Digest of all that a template and its clones must have in common: shape, guest image, QEMU, …"""
        ...

    async def list_templates(self) -> Sequence[TemplateInfo]:
        """All that are kept, those that were used last first."""
        ...

    async def load_template(self, key: str, *, timeout_s: float) -> bool:
        """Verify a template and keep its memory at hand for the next clone; False when there is none.

        A broken one is dropped, and counts as none.
        """
        ...

    async def save_template(self, vm: Vm, *, timeout_s: float) -> None:
        """Make *vm*, launched with ``template_key``, that template; ends the VM.

        Its agent must have answered. On failure nothing of the template is left; the VM may still live and
        must be stopped.
        """
        ...

    async def drop_template(self, key: str) -> None:
        """Forget and delete a template, finished or begun; its clones go on. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process in the guest ended."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class ContainerExited:
    """The main process of a container ended."""

    container_id: str
    exit_code: int
    oom_killed: bool
    probe_failure: str | None = None
    """Why its probes have ended it, if they have."""


@dataclass(frozen=True, slots=True)
class ContainerHealth:
    """The probes of a container say something new."""

    container_id: str
    ready: bool


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The session with the guest agent ended without ``close``; always the last event."""

    reason: str


GuestEvent = ContainerExited | ContainerHealth | SessionLost


@dataclass(frozen=True, slots=True)
class LogPosition:
    """How far the output of a container is kept on the host."""

    instance: int
    """Tells the outputs of containers of one id from each other."""
    offset: int
    """Bytes of that output."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A piece of what a container's main process wrote, or the note that it has ended."""

    container_id: str
    instance: int
    """See `LogPosition.instance`."""
    kind: Literal["stdout", "stderr", "end"]
    offset: int
    """How many bytes were written before it, lost ones included: a gap is what the guest had to drop."""
    time_ns: int
    """When it was written, by the guest's clock."""
    data: bytes
    """At most 32 KiB; empty for ``end``."""


class LogFeed(Protocol):
    """The outputs of all containers of one guest. What nobody reads waits in the guest, in bounded rings."""

    def records(self) -> AsyncIterator[Sequence[LogRecord]]:
        """Batches as they come; asking for the next one says that the one before is kept.

        To be iterated once. Ends after ``close``; AgentError when the session is lost.
        """
        ...

    async def close(self) -> None:
        """Want no more. Idempotent."""
        ...


class RunningProcess(Protocol):
    """A process in the guest with its streams. Unread output stops the process, never the session."""

    async def write_stdin(self, data: bytes) -> None:
        """Write; waits while the process does not read. Data after the process's end is dropped silently."""
        ...

    async def close_stdin(self) -> None:
        """Signal end of input. Idempotent."""
        ...

    def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes | memoryview]]:
        """Chunks as they come, until both streams have ended. To be iterated once."""
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal; nothing if it has none, or has ended."""
        ...

    async def signal(self, number: int) -> None:
        """Send a signal to the process and what it started in its session; nothing if it has ended."""
        ...

    async def wait(self) -> ProcessExit:
        """Wait for its end. 127: not found, 126: not executable, 128+n: signal n."""
        ...

    async def close(self) -> None:
        """Kill it if it still runs, and free its streams. Idempotent."""
        ...


CopyDirection = Literal["in", "out"]


class GuestConnection(Protocol):
    """A TCP connection inside a guest. What is not read holds up its sender."""

    async def write(self, data: bytes) -> None:
        """Send; waits while the other side does not read. Dropped silently once it has closed."""
        ...

    async def close_write(self) -> None:
        """Send no more; what comes can still be read. Idempotent."""
        ...

    def received(self) -> AsyncIterator[bytes | memoryview]:
        """What comes, to its end. To be iterated once."""
        ...

    async def close(self) -> None:
        """Close in both directions. Idempotent."""
        ...


class GuestSession(Protocol):
    """A live connection to one guest's agent. All calls raise AgentError once it is lost."""

    @property
    def info(self) -> GuestInfo:
        """What the agent said of itself."""
        ...

    async def configure(self, config: GuestConfig, *, timeout_s: float) -> None:
        """Give the guest its identity: clock, entropy, hostname, interfaces."""
        ...

    async def set_clock(self, time_ns: int, *, timeout_s: float) -> None:
        """Set the guest's wall clock (nanoseconds since 1970): it stood while the vCPUs were stopped."""
        ...

    async def set_watchdog(self, watchdog: Watchdog, *, timeout_s: float) -> None:
        """Have the guest end by itself, unless it hears of this again before. Replaces what was set before.

        It sends its containers their stop signals, gives each its ``stop_timeout_s``, but no more than the
        grace, and powers off. Time in which its vCPUs are stopped does not count.
        """
        ...

    async def create_container(self, container: GuestContainer, *, timeout_s: float) -> None:
        """Make a container without starting its process: mounts and cgroup. Undone on failure.

        Raises:
            InvalidArgumentError: User, group or capability that does not exist, and the like.
            AlreadyExistsError: The guest has a container of this id.
        """
        ...

    async def start_container(self, container_id: str, *, timeout_s: float) -> int:
        """Start the main process; returns its pid in the guest.

        A program that cannot be executed makes a container that has exited with 127 or 126, not an error.
        """
        ...

    async def signal_container(
        self, container_id: str, number: int, *, everyone: bool, timeout_s: float
    ) -> None:
        """Send a signal to the main process, or to every process; nothing if it is not running."""
        ...

    async def pause_container(self, container_id: str, *, timeout_s: float) -> None:
        """Freeze every process of a running container; returns when they stand still. Idempotent.

        Raises:
            NotFoundError: The guest has no such container.
            FailedPreconditionError: It does not run.
            AgentError: Some process did not stop in time; all of them go on.
        """
        ...

    async def resume_container(self, container_id: str, *, timeout_s: float) -> None:
        """Let the processes of a paused container go on; nothing if it is not paused.

        Raises:
            NotFoundError: The guest has no such container.
        """
        ...

    async def update_container(
        self, container_id: str, resources: ContainerResources, *, timeout_s: float
    ) -> None:
        """Give a container these limits, all of them; None lifts one. It need not run. Undone on failure.

        Raises:
            NotFoundError: The guest has no such container.
            FailedPreconditionError: It uses more than a limit would allow; says how much.
        """
        ...

    async def available_memory(self, *, timeout_s: float) -> int:
        """Bytes that the guest could give away without ending a process, by its own account."""
        ...

    async def list_processes(
        self, container_id: str, *, limit: int, timeout_s: float
    ) -> tuple[Sequence[ContainerProcess], int]:
        """The oldest *limit* processes of a container, and how many there are. Raises NotFoundError."""
        ...

    async def read_stats(self, *, timeout_s: float) -> tuple[GuestStats, Sequence[ContainerStats]]:
        """What the guest and its containers use, those that do not run included; one question and one answer.

        Raises:
            UnsupportedError: The guest's agent cannot tell.
        """
        ...

    async def delete_container(self, container_id: str, *, timeout_s: float) -> None:
        """Kill what is left of it, unmount, remove its cgroup. Succeeds when there is no such container."""
        ...

    async def list_containers(self, *, timeout_s: float) -> Sequence[GuestContainerState]:
        """All containers that the guest has."""
        ...

    async def follow_logs(self, known: Mapping[str, LogPosition], *, timeout_s: float) -> LogFeed:
        """Get what containers write and have written since *known* (by container; others: from the start).

        Containers that come later are in it, too.

        Raises:
            FailedPreconditionError: They are followed in this session already.
            UnsupportedError: The guest's agent cannot do that.
        """
        ...

    async def execute(
        self,
        process: GuestProcess,
        *,
        container_id: str | None,
        tty: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> RunningProcess:
        """Start a process inside a running container, or in the guest itself (None).

        With *tty* (rows, columns) it has a terminal, and all output is ``stdout``; the end of its input means
        nothing then. *timeout_s* bounds the start only. A program that cannot be executed gives a process
        that has already ended with 127 or 126 and a line on stderr.

        Raises:
            NotFoundError: The guest has no such container.
            FailedPreconditionError: It does not run.
            InvalidArgumentError: No such user or group, and the like.
        """
        ...

    async def copy(
        self, direction: CopyDirection, *, container_id: str, path: str, max_bytes: int, timeout_s: float
    ) -> RunningProcess:
        """Copy files of a container, which need not run, as a tar stream: ``in`` by stdin, ``out`` by stdout.

        Nothing in the archive and no link leads out of the container. What goes wrong is told as a JSON array
        of an error code and a message on stderr, with an exit code other than 0.

        Args:
            direction: ``in`` or ``out``.
            container_id: The container.
            path: ``out``: the file or directory. ``in``: the directory to unpack into; where there is none of
                that name, the first name in the archive becomes it.
            max_bytes: Most bytes of content.
            timeout_s: Seconds for the start.

        Raises:
            NotFoundError: The guest has no such container.
        """
        ...

    async def attach(self, container_id: str, *, tty: bool, timeout_s: float) -> RunningProcess:
        """Attach to the main process of a running container: its output from now on, and its input.

        Its input does something only where the container was made with one; its end ends the input of the
        process, unless that has a terminal. ``close`` detaches and kills nothing; ``wait`` gives 0 then.

        Args:
            container_id: The container.
            tty: Whether it was made with a terminal.
            timeout_s: Seconds for the answer.

        Raises:
            NotFoundError, FailedPreconditionError: There is no such container, or it does not run.
        """
        ...

    async def connect_port(self, port: int, *, timeout_s: float) -> GuestConnection:
        """Connect to a TCP port of the pod's loopback interface, 127.0.0.1 or ::1.

        Raises:
            FailedPreconditionError: Nobody listens there.
        """
        ...

    async def ping(self, *, timeout_s: float) -> None:
        """Ask for a sign of life."""
        ...

    async def shutdown(self, *, timeout_s: float) -> None:
        """Ask the guest to power off; returns when it has agreed, the session ends soon after."""
        ...

    def events(self) -> AsyncIterator[GuestEvent]:
        """What happens in the guest, from the start of the session; ends after `SessionLost` or ``close``.

        Containers that ended while no session was open are reported by ``list_containers`` only.
        """
        ...

    async def close(self) -> None:
        """End the session; the guest and its containers go on, its execs are killed. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class AgentAccess:
    """What an agent driver needs to know to reach a guest, besides its VM. The default is for templates."""

    config: AgentConfig = AgentConfig()  # noqa: RUF009 -- frozen
    """As the pod has it."""
    endpoints: Sequence[Endpoint] = ()
    """The guest's interfaces."""
    private_key: bytes | None = field(default=None, repr=False)
    """What the file holds that ``config`` names; None: the driver's own key."""
    host_key: str | None = None
    """By which the guest has proved itself before."""


PLAIN_ACCESS = AgentAccess()
"""Nothing but the VM: all that a VM without a pod has."""


class GuestAgent(Protocol):
    """Opens sessions with the agents of guests."""

    @property
    def info(self) -> DriverInfo:
        """Capabilities; ``containers``, ``exec`` and ``stats`` among them where it has those."""
        ...

    @property
    def share_tag(self) -> str:
        """Mount tag under which the agent looks for the 9p share."""
        ...

    def channels(self, config: AgentConfig) -> tuple[Channel, ...]:
        """Serial ports that the agent needs. Pure."""
        ...

    async def connect(self, vm: Vm, *, access: AgentAccess = PLAIN_ACCESS, timeout_s: float) -> GuestSession:
        """Wait for the guest's agent and open a session.

        Raises:
            AgentError: It did not answer in time, or speaks another protocol.
        """
        ...


class Network(Protocol):
    """Connects VMs. A pod's network is planned with its record, then attached, and detached at its end.

    A network that makes anything on the host is `vcnode.drivers.audit.Auditable` as well: ``held`` lists its
    ``link``, ``namespace``, ``lease``, … of every VM of the node, ``free`` removes one. The audit then finds
    it, and orphans go after the processes that used them and before their directories.
    """

    @property
    def info(self) -> DriverInfo:
        """Capabilities and findings; complete after ``open``.

        ``spares``: `prepare` makes what a VM needs before it is anybody's.
        """
        ...

    async def open(self) -> None:
        """See what the host can do, and take up what an earlier node agent has left in order.

        What this driver cannot do here is said in ``info.notes`` and refused by `plan`: a node agent starts
        all the same.
        """
        ...

    async def close(self) -> None:
        """Free what the driver itself holds; pods stay connected. Idempotent."""
        ...

    def check(self, config: NetworkConfig) -> None:
        """See that this driver knows what is asked for. Pure.

        Raises:
            InvalidArgumentError: A field does not go with this driver; its path begins with ``pod.network``.
            UnsupportedError: This host lacks what it needs; says what to do.
        """
        ...

    def netdev_count(self, config: NetworkConfig) -> int | None:
        """Interfaces that a pod of that configuration gets; None when only `attach` can tell. Pure."""
        ...

    def plan(self, request: NetworkRequest, held: Sequence[NetworkAttachment]) -> NetworkAttachment:
        """Choose addresses, ports and names for a pod's network. Pure; makes nothing.

        Runs inside the transaction that begins the start, in the thread of the database, so that no two pods
        get the same.

        Args:
            request: The pod.
            held: What all other pods of the node hold, of any driver.

        Raises:
            ResourceExhaustedError: No address is left.
            FailedPreconditionError: A port is another pod's.
            InvalidArgumentError, UnsupportedError: As `check`.
        """
        ...

    async def prepare(self, vm_id: str, netdev_count: int, *, timeout_s: float) -> NetworkAttachment:
        """Make namespace and taps for a VM that belongs to no pod yet: a spare, or one to become a template.

        `attach` of a plan for the same VM completes it; `detach` removes it.

        Raises:
            UnsupportedError: Without the capability ``spares``.
            NetworkError: It could not be made; nothing is left.
        """
        ...

    async def attach(self, planned: NetworkAttachment, *, timeout_s: float) -> NetworkAttachment:
        """Make what `plan` has planned; what `prepare` has made for the VM is used.

        Returns:
            The attachment as it is now: *planned* itself, where all could be known before.

        Raises:
            NetworkError: It could not be made. `detach` removes what is left of it.
        """
        ...

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """Open the taps of an attachment, one descriptor per endpoint; the caller closes them.

        Raises:
            NetworkError: One of them is gone, or in use.
        """
        ...

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """Remove all that ``attach`` or ``prepare`` made, or had begun to make. Idempotent.

        After a crash in the middle, or for an orphan, the attachment may hold no more than its ``vm_id``.

        Raises:
            NetworkError: Something is still there; may be tried again.
        """
        ...

    async def recover(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See that the network of a running pod still stands after the node agent was away, and mend it.

        Raises:
            NetworkError: It cannot be mended; the pod goes on without it.
        """
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image as a file."""

    digest: str
    """``sha256:`` and 64 hex digits."""
    path: Path
    size_bytes: int
    config: ImageConfig | None = None
    """What the source said about the process to run; None where it says nothing, and for an image found."""
    manifest_digest: str | None = None
    """Digest of the manifest that it was made of; None as above."""


@dataclass(frozen=True, slots=True)
class LayerFile:
    """The writable disk of a container as a file: ext4, sparse."""

    path: Path
    is_new: bool
    """Whether this call has made it."""


@dataclass(frozen=True, slots=True)
class PullSource:
    """What to pull, and as whom."""

    reference: str
    """Such as ``registry.example/team/app:1.2`` or ``busybox`` (Docker Hub's)."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)


class Storage(Protocol):
    """Host directories and images, made reachable for VMs."""

    async def make_vm_dir(self, vm_id: str) -> Path:
        """Make the VM's own directory, with an empty ``shared`` in it."""
        ...

    async def remove_vm_dir(self, vm_id: str) -> None:
        """Unmount whatever is shared there and remove the directory. Idempotent."""
        ...

    async def write_note(self, vm_id: str, text: str) -> None:
        """Keep *text* in the VM's own directory, where it outlives the node agent and its database.

        It replaces the note before it as a whole. Not synced to the disk: no VM outlives its host.

        Raises:
            StorageError: The VM has no directory, or its disk is full; the note before it stays.
        """
        ...

    async def read_notes(self, mark: str) -> Mapping[str, str]:
        """The notes of all VMs whose id begins with *mark*, by VM id; VMs without one are left out."""
        ...

    async def check_rootfs(self, path: str) -> None:
        """See that *path* is a directory under the allowed roots, links resolved.

        Raises:
            InvalidArgumentError: Not a directory, or outside the allowed roots.
            NotFoundError: It does not exist.
        """
        ...

    async def open_file(self, path: str, *, writable: bool = False) -> int:
        """Open a plain file under the allowed roots, to read or for both; the caller closes the descriptor.

        Raises:
            InvalidArgumentError: Outside of them, links resolved, or no plain file.
            NotFoundError: It does not exist.
        """
        ...

    async def open_hook(self, path: str) -> int:
        """Open a program below the directories of hooks; the caller closes the descriptor.

        Raises:
            InvalidArgumentError: Outside of them, links resolved; or no plain file that only root can change.
            NotFoundError: It does not exist.
        """
        ...

    async def listen(self, vm_id: str, path: str) -> int:
        """Make a UNIX socket under the allowed roots, for root, and listen there; the caller closes it.

        `remove_vm_dir` of the VM removes it, unless somebody else listens there by then.

        Raises:
            InvalidArgumentError: The directory is outside of them, links resolved, or there is none.
            NotFoundError: The directory does not exist.
            FailedPreconditionError: Somebody listens there, or something else is in its place.
            StorageError: The VM has no directory.
        """
        ...

    async def connect(self, path: str) -> int:
        """Connect to a UNIX socket under the allowed roots; the caller closes the descriptor.

        Raises:
            InvalidArgumentError: Outside of them, links resolved, or no socket.
            NotFoundError: It does not exist.
            FailedPreconditionError: Nobody listens there.
        """
        ...

    async def open_disk(
        self,
        path: str,
        disk_format: DiskFormat,
        *,
        writable: bool = False,
        overlay_id: str | None = None,
        timeout_s: float,
    ) -> DiskFile:
        """Open a disk image under the allowed roots; the caller closes its descriptors.

        Args:
            path: The image.
            disk_format: What it holds.
            writable: Whether it is written to itself.
            overlay_id: Otherwise: id, with the node's mark, of what takes the writes; made unless it is
                there, and removed by `remove_layer`. None: there is nothing to write to.
            timeout_s: Limit of all of it.

        Raises:
            InvalidArgumentError: As `open_file`; or it is no image of that format, or needs other files.
            NotFoundError: It does not exist.
            StorageError: The overlay could not be made; nothing is left of it.
        """
        ...

    async def read_secret(self, path: str, *, private: bool = False) -> bytes:
        """What a file below the directories of secrets holds.

        Args:
            path: The file.
            private: Whether it must be for its owner only, who is root or the node agent's user.

        Raises:
            InvalidArgumentError: Outside of them, links resolved; no plain file; too long; or not private.
            NotFoundError: It does not exist.
        """
        ...

    async def share(self, vm_id: str, name: str, path: str, *, read_only: bool = False) -> None:
        """Make the host directory *path* appear as ``shared/<name>`` of the VM; checks as `check_rootfs`.

        *read_only*: nothing in the VM can write there, whatever it mounts how.
        """
        ...

    async def unshare(self, vm_id: str, name: str) -> None:
        """Take it away again. Idempotent."""
        ...

    async def build_image(self, source: str, *, timeout_s: float) -> ImageFile:
        """Make an erofs file of a directory or tar on the host. The same content gives the same digest."""
        ...

    async def pull_image(
        self,
        source: PullSource,
        known: Callable[[str], tuple[str, ImageConfig] | None],
        progress: Callable[[PullProgress], Awaitable[None]],
        *,
        timeout_s: float,
    ) -> ImageFile:
        """Fetch an image from a registry and make an erofs file of it. Nothing of a failed one is left.

        Args:
            source: The image.
            known: Gives digest and config of what was made of the manifest of that digest, if anything was:
                then nothing is fetched, if the file is still there.
            progress: Called with where it stands, about once a second.
            timeout_s: Limit of all of it.

        Raises:
            InvalidArgumentError: The registry refuses the credentials, or the image cannot be used.
            NotFoundError: The registry has no such image for this host's architecture.
            UnavailableError: The registry does not answer.
            ResourceExhaustedError: There is no space for it, or it is larger than an image may be.
            DeadlineExceededError: It took longer.
        """
        ...

    async def blank_image(self, *, timeout_s: float) -> ImageFile:
        """An image with nothing in it. Raises StorageError when it cannot be made."""
        ...

    async def image_file(self, digest: str) -> ImageFile:
        """The file of an image. Raises NotFoundError when it is gone."""
        ...

    async def image_files(self) -> Sequence[ImageFile]:
        """All complete files of images that are here, whoever knows of them; the blank image is none."""
        ...

    async def remove_image(self, digest: str) -> None:
        """Delete an image's file. Idempotent."""
        ...

    async def make_layer(self, layer_id: str, size_mib: int, *, timeout_s: float) -> LayerFile:
        """The writable disk of that id; made, formatted and empty, unless it is there.

        Args:
            layer_id: An id as of a VM, with the node's mark.
            size_mib: Size, a power of two; disks of one size are copies of one that was formatted once.
            timeout_s: Limit of all of it.

        Raises:
            ResourceExhaustedError: The host has no space left.
            StorageError: It could not be made; nothing is left of it.
        """
        ...

    async def remove_layer(self, layer_id: str) -> None:
        """Delete a writable disk. Idempotent."""
        ...
