"""Pods and containers as callers describe them, and as the node reports them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import (
    Blob,
    ContainerId,
    HostPath,
    ImageName,
    Labels,
    Moment,
    NoNul,
    PodId,
    Reply,
    Request,
)
from vcnode.models.hooks import Hooks
from vcnode.models.hypervisor import HypervisorConfig
from vcnode.models.network import NetworkConfig, NetworkModel, NetworkNamespace
from vcnode.models.probes import Probes
from vcnode.models.secrets import MAX_SECRETS, Sealed, SecretFile, SecretPath, check_one
from vcnode.models.signals import Signal
from vcnode.models.sshd import SshdConfig
from vcnode.models.volumes import (
    MAX_MOUNTS,
    MAX_SOCKETS,
    MAX_VOLUMES,
    Mount,
    PortName,
    Socket,
    Volume,
    check_distinct,
)

MIN_MEM_SIZE_MIB = 128
"""The smallest guest worth booting. Measured with one vCPU: with 112 MiB the kernel panics while it unpacks
the initramfs (16 MB, and as much again unpacked), with 116 it boots, with 128 containers have 26 MiB."""
MAX_MEM_SIZE_MIB = 1024 * 1024
MAX_VCPU_COUNT = 64
MAX_CONTAINERS = 64
MIN_DISK_SIZE_MIB = 64
MAX_DISK_SIZE_MIB = 1024 * 1024
DEFAULT_DISK_SIZE_MIB = 1024
MAX_OUTPUT_BYTES = 256 * 1024
"""Most bytes of one output stream in an exec reply: two of them fit a NATS message of 1 MiB as base64."""


DEFAULT_STOP_TIMEOUT_S = 10.0
DISCONNECT_MARGIN_S = 30.0
"""Seconds, besides its containers' grace, in which a pod that is stopped or paused for want of NATS has
ended: the guest's watchdog comes `WATCHDOG_LATE_S` after the node, a power-off takes up to 5, a kill 20."""
WATCHDOG_LATE_S = 5.0
"""Seconds by which the node is ahead of the guest's watchdog."""


class PodState(StrEnum):
    """Where a pod is in its life; the transitions are in ``pods/lifecycle.py``."""

    READY = "ready"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class ContainerState(StrEnum):
    """Where a container is in its life."""

    READY = "ready"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class HypervisorType(StrEnum):
    """Drivers that run VMs."""

    QEMU = "qemu"
    MOCK = "mock"


class AgentType(StrEnum):
    """Drivers that reach into a guest."""

    NATIVE = "native"
    NOOP = "noop"
    MOCK = "mock"
    HYPERSTART = "hyperstart"
    SSHD = "sshd"


class RestartPolicy(StrEnum):
    """Whether what has ended is started again."""

    NEVER = "never"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class Resources(Request):
    """What the VM of a pod has."""

    vcpu_count: int = Field(default=1, ge=1, le=MAX_VCPU_COUNT)
    """Virtual CPUs."""
    mem_size_mib: int = Field(default=256, ge=MIN_MEM_SIZE_MIB, le=MAX_MEM_SIZE_MIB)
    """Guest memory in MiB."""


class HyperConfig(Request):
    """How the agent ``hyperstart`` is reached, and what it speaks."""

    dialect: Literal["hyperhq", "clearcontainers"] = "hyperhq"
    """Whose hyperstart it is; ``clearcontainers`` is the fork of virtcontainers 1.0.8. Both tell the same
    versions."""

    ctl_port: PortName = "sh.hyper.channel.0"
    """Name in the guest of the serial port that carries commands."""
    tty_port: PortName = "sh.hyper.channel.1"
    """Name in the guest of the serial port that carries the streams of processes."""


class AgentConfig(Request):
    """Settings of agent drivers, by ``agent_type``; those of the others are ignored."""

    hyperstart: HyperConfig = HyperConfig()
    """Of ``hyperstart``."""
    sshd: SshdConfig = SshdConfig()
    """Of ``sshd``."""


class EnvVar(Request):
    """One environment variable."""

    var: Annotated[str, StringConstraints(pattern=r"^[^=\x00]+$", max_length=4096)]
    """Name."""
    value: Annotated[NoNul, StringConstraints(max_length=131072)] | None = None
    """Value, for everybody to see who sees the request or the node's database."""
    sealed: Sealed | None = None
    """Value, sealed for the node (docs/security.md); UTF-8 without NUL."""
    file: SecretPath | None = None
    """The value is what this file on the host holds when the process is made, without a last newline."""

    @model_validator(mode="after")
    def _one_value(self) -> Self:
        check_one({"value": self.value, "sealed": self.sealed, "file": self.file})
        return self


class Rlimit(Request):
    """One resource limit, as in setrlimit(2)."""

    type: Annotated[str, StringConstraints(pattern=r"^[a-z]+$")]
    """Name without RLIMIT_ in lower case: ``nofile``, ``nproc``, ``core``, …"""
    soft: int = Field(ge=-1)
    """Soft limit; -1 is unlimited."""
    hard: int = Field(ge=-1)
    """Hard limit; -1 is unlimited."""


class Cmd(Request):
    """A command and how it runs."""

    args: tuple[Annotated[NoNul, StringConstraints(max_length=131072)], ...] = Field(
        default=(), max_length=4096
    )
    """Program and arguments. In a container of an image, empty means the image's entrypoint and command."""
    envs: tuple[EnvVar, ...] = Field(default=(), max_length=4096)
    """Environment; a later entry of the same name wins."""
    workdir: Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$", max_length=4096)] | None = None
    """Working directory inside the container; made if it is missing. Default: the image's, else ``/``."""
    user: Annotated[NoNul, StringConstraints(max_length=256)] | None = None
    """User name or number inside the container, ``user:group`` allowed. Default: the image's, else 0."""
    group: Annotated[NoNul, StringConstraints(max_length=256)] | None = None
    """Group name or number. Default: the user's primary group."""
    supplementary_groups: tuple[Annotated[NoNul, StringConstraints(max_length=256)], ...] = Field(
        default=(), max_length=64
    )
    """Further groups, by name or number; the user's own from /etc/group come besides."""
    rlimits: tuple[Rlimit, ...] = Field(default=(), max_length=16)
    """Resource limits of the process."""
    no_new_privileges: bool = True
    """Whether setuid programs and file capabilities are without effect."""
    capabilities: tuple[Annotated[str, StringConstraints(pattern=r"^CAP_[A-Z_]+$")], ...] | None = None
    """Exactly these capabilities. Default: the OCI default set (docs/containers.md)."""


class ContainerResources(Request):
    """cgroup v2 limits inside the guest; unset means bounded by the VM only."""

    cpu_quota_us: int | None = Field(default=None, ge=1000)
    """Microseconds of CPU per period (``cpu.max``)."""
    cpu_period_us: int = Field(default=100_000, ge=1000, le=1_000_000)
    """Length of the period in microseconds."""
    cpu_shares: int | None = Field(default=None, ge=2, le=262_144)
    """Relative weight, in the old unit where 1024 is the default; converted to ``cpu.weight``."""
    mem_limit_mib: int | None = Field(default=None, ge=4)
    """Memory limit in MiB (``memory.max``); a process that exceeds it is killed."""
    pids_limit: int | None = Field(default=None, ge=1)
    """Most processes and threads (``pids.max``)."""


class ContainerSpec(Request):
    """A container as callers describe it. Exactly one of ``rootfs`` and ``image`` is given."""

    id: ContainerId | None = None
    """Unique within the pod; made by the node if absent."""
    rootfs: HostPath | None = None
    """Directory on the host that is the container's root; shared with the VM, changes reach the host."""
    image: ImageName | None = None
    """Image known to the node; attached read-only under a writable layer."""
    writable: Literal["memory", "disk"] = "memory"
    """Where that layer is: in the guest's ``memory``, or on a ``disk`` of the container's own on the host,
    which outlives the VM and goes when the container or the pod is deleted."""
    disk_size_mib: int | None = Field(default=None, ge=MIN_DISK_SIZE_MIB, le=MAX_DISK_SIZE_MIB)
    """Size of that disk in MiB, a power of two; the host gives only as much as is written. Default: 1024."""
    readonly_rootfs: bool = False
    """Whether the root is mounted read-only."""
    cmd: Cmd = Cmd()
    """Main process."""
    resources: ContainerResources = ContainerResources()
    """Limits."""
    secrets: tuple[SecretFile, ...] = Field(default=(), max_length=MAX_SECRETS)
    """Files that only the container sees, in its ``/run/secrets``."""
    mounts: tuple[Mount, ...] = Field(default=(), max_length=MAX_MOUNTS)
    """What it mounts besides its root."""
    stdin: bool = False
    """Whether ``container.attach`` can write to the main process's input; otherwise that is /dev/null."""
    tty: bool = False
    """Whether the main process has a terminal. Then all its output is ``stdout``."""
    stop_signal: Signal | None = None
    """Signal that asks the main process to end, by number or name. Default: the image's, else SIGTERM."""
    stop_timeout_s: float = Field(default=DEFAULT_STOP_TIMEOUT_S, ge=0, le=3600)
    """Seconds between the stop signal and SIGKILL."""
    restart_policy: RestartPolicy = RestartPolicy.NEVER
    """Whether it is started again when its main process has ended: ``never``, ``on-failure`` (when the exit
    code is not 0), or ``always``. Never after ``container.stop`` or ``pod.stop``."""
    max_restarts: int | None = Field(default=None, ge=1, le=1_000_000)
    """With ``on-failure``: most restarts in a row; a healthy time between them begins a new one.
    Default: any."""
    probes: Probes = Probes()
    """How it is found out whether it has started, is ready, and still works."""
    labels: Labels = {}
    """For selection."""
    annotations: Labels = {}
    """For people and other programs; the node ignores them."""

    @model_validator(mode="after")
    def _one_root(self) -> Self:
        if (self.rootfs is None) == (self.image is None):
            raise ValueError("give exactly one of 'rootfs' and 'image'")
        if self.rootfs is not None and not self.cmd.args:
            raise ValueError("'cmd.args' is required with 'rootfs' (only an image has a default command)")
        _check_max_restarts(self.restart_policy, self.max_restarts)
        names = [secret.name for secret in self.secrets]
        if len(set(names)) < len(names):
            raise ValueError("'secrets' must have distinct names")
        places = [mount.destination for mount in self.mounts]
        if len(set(places)) < len(places):
            raise ValueError("'mounts' must have distinct destinations")
        return self

    @model_validator(mode="after")
    def _disk(self) -> Self:
        if self.writable == "disk" and self.image is None:
            raise ValueError("'writable' is for an 'image'; what is written to a 'rootfs' goes to the host")
        if self.disk_size_mib is not None:
            if self.writable != "disk":
                raise ValueError("'disk_size_mib' needs 'writable' to be 'disk'")
            if self.disk_size_mib & (self.disk_size_mib - 1):
                raise ValueError("'disk_size_mib' must be a power of two, such as 1024")
        return self

    @property
    def wanted_disk_mib(self) -> int:
        """Size of its writable disk in MiB; 0 when it has none."""
        return 0 if self.writable != "disk" else self.disk_size_mib or DEFAULT_DISK_SIZE_MIB


def _check_max_restarts(policy: RestartPolicy, most: int | None) -> None:
    if most is not None and policy is not RestartPolicy.ON_FAILURE:
        raise ValueError("'max_restarts' goes with the restart policy 'on-failure' only")


class OnDisconnect(Request):
    """What becomes of a pod when its node has had no NATS for a while."""

    action: Literal["keep", "pause", "stop"] = "keep"
    """``keep``: it goes on. ``pause``: its vCPUs are stopped, and run again once NATS is back. ``stop``: it
    is stopped, and stays so; its guest ends it when the node agent is dead."""
    after_s: float | None = Field(default=None, ge=1, le=604_800)
    """Seconds since the node last renewed its lease; at least the node's ``nats.lease_s``. Required with
    ``pause`` and ``stop``."""

    @model_validator(mode="after")
    def _after(self) -> Self:
        if (self.after_s is None) != (self.action == "keep"):
            raise ValueError("'after_s' goes with the actions 'pause' and 'stop', and is required there")
        return self


class PodSpec(Request):
    """A pod as callers describe it."""

    id: PodId | None = None
    """Made by the node if absent."""
    hostname: (
        Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$")] | None
    ) = None
    """Hostname in the guest. Default: the pod id, '_' replaced by '-'."""
    resources: Resources = Resources()
    """Size of the VM."""
    hypervisor_type: HypervisorType | None = None
    """Driver that runs the VM. Default: the node's."""
    hypervisor_config: HypervisorConfig = HypervisorConfig()
    """How that driver builds the VM, and what it boots."""
    agent_type: AgentType | None = None
    """Driver that reaches into the guest. Default: the node's."""
    agent_config: AgentConfig = AgentConfig()
    """How that driver does so."""
    network_model: NetworkModel | None = None
    """Driver that connects the pod. Default: the node's."""
    network: NetworkConfig = NetworkConfig()
    """What that driver is to do."""
    template: Literal["auto", "require", "never"] = "auto"
    """Whether the VM starts as a copy of a booted one of its shape: ``auto`` where that is possible,
    ``require`` or fail, ``never`` (always boot)."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """When more pods start than may at once, higher ones go first."""
    restart_policy: RestartPolicy = RestartPolicy.NEVER
    """Whether the pod is started again when its VM has ended without being asked to: ``never``,
    ``on-failure`` (at most ``max_restarts`` times in a row), or ``always``. Containers have their own."""
    max_restarts: int | None = Field(default=None, ge=1, le=1_000_000)
    """With ``on-failure``: most restarts in a row. Default: any."""
    on_disconnect: OnDisconnect = OnDisconnect()
    """What becomes of it when the node has had no NATS for a while."""
    volumes: tuple[Volume, ...] = Field(default=(), max_length=MAX_VOLUMES)
    """What of the host its containers can mount; more can be added later."""
    sockets: tuple[Socket, ...] = Field(default=(), max_length=MAX_SOCKETS)
    """UNIX sockets of the host that are connected with the guest."""
    hooks: Hooks = Hooks()
    """Programs on the host that run at points of its life."""
    containers: tuple[ContainerSpec, ...] = Field(default=(), max_length=MAX_CONTAINERS)
    """Containers that start with the pod; more can be added later."""
    labels: Labels = {}
    """For selection."""
    annotations: Labels = {}
    """For people and other programs; the node ignores them."""

    @model_validator(mode="after")
    def _distinct_ids(self) -> Self:
        _check_max_restarts(self.restart_policy, self.max_restarts)
        ids = [c.id for c in self.containers if c.id is not None]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"container ids must be distinct; {', '.join(twice)} is used more than once")
        check_distinct(self.volumes, self.sockets)
        return self

    @property
    def disconnect_grace_s(self) -> float:
        """Seconds that its containers, later ones included, get to end when `on_disconnect` stops it."""
        return max(
            (container.stop_timeout_s for container in self.containers), default=DEFAULT_STOP_TIMEOUT_S
        )

    @property
    def ends_after_s(self) -> float | None:
        """Seconds by which nothing of it runs any more on a node whose lease was lost; None: it goes on."""
        if self.on_disconnect.after_s is None:
            return None
        grace_s = self.disconnect_grace_s if self.on_disconnect.action == "stop" else 0.0
        return self.on_disconnect.after_s + grace_s + DISCONNECT_MARGIN_S


class ContainerStatus(Reply):
    """What the node knows of a container."""

    pod_id: str
    """Pod that holds it."""
    container_id: str
    """Its id."""
    state: ContainerState
    """``ready``, ``running``, ``paused`` or ``stopped``."""
    ready: bool = False
    """Whether it runs, and its startup and readiness probes, if it has them, say that it is ready."""
    pid: int | None = None
    """Process id of the main process inside the guest, while it runs."""
    exit_code: int | None = None
    """Exit code once stopped: 127 not found, 126 not executable, 128+n ended by signal n."""
    oom_killed: bool = False
    """Whether the memory limit ended it."""
    reason: str | None = None
    """Why it stopped, where the exit code does not say it."""
    restart_count: int = 0
    """How often its restart policy has started it again since a command last did."""
    restart_at: Moment | None = None
    """When it will be started again, while it waits for that."""
    rootfs: str | None = None
    """Host directory, if its root is one."""
    image: str | None = None
    """Image name, if its root is an image."""
    image_digest: str | None = None
    """Digest of that image's file."""
    disk_size_mib: int | None = None
    """Size of its writable disk in MiB, if it has one."""
    mounts: tuple[Mount, ...] = ()
    """What it mounts."""
    resources: ContainerResources = ContainerResources()
    """Its limits, as given or as last changed by ``container.update``."""
    created_at: Moment
    """When it was created."""
    started_at: Moment | None = None
    """When the main process last started."""
    finished_at: Moment | None = None
    """When the main process last ended."""
    labels: dict[str, str] = {}
    """As given."""
    annotations: dict[str, str] = {}
    """As given."""


class HypervisorStatus(Reply):
    """The VM of a running pod."""

    type: HypervisorType
    """Driver."""
    vm_id: str
    """Id of the VM; it differs from the pod's and changes with each start."""
    pid: int | None = None
    """Process id on the host."""
    uuid: str
    """UUID given to the VM."""
    accelerator: str | None = None
    """``kvm`` or ``tcg``."""
    mock: bool = False
    """True when no VM exists (mock hypervisor)."""


class PodStatus(Reply):
    """What the node knows of a pod."""

    pod_id: str
    """Its id."""
    node: str
    """Node that holds it."""
    state: PodState
    """Where it is in its life."""
    reason: str | None = None
    """Why it failed, with the last words of the guest's console where they help; or why ``on_disconnect`` has
    paused or stopped it."""
    ready: bool = False
    """Whether it runs and all of its containers are ready."""
    restart_count: int = 0
    """How often its restart policy has started it again since a command last did."""
    restart_at: Moment | None = None
    """When it will be started again, while it waits for that."""
    revision: int
    """Counts the changes of this pod's record; usable in ``Vcnode-Expected-Revision``."""
    created_at: Moment
    """When it was created."""
    started_at: Moment | None = None
    """When it last became running."""
    finished_at: Moment | None = None
    """When it last stopped or failed."""
    hostname: str
    """Hostname in the guest."""
    resources: Resources
    """Size of the VM."""
    mem_size_mib: int = 0
    """Memory that it has now: another than that of ``resources`` after ``pod.resize``."""
    hypervisor: HypervisorStatus | None = None
    """The VM, while there is one."""
    agent_type: AgentType
    """Driver that reaches into the guest."""
    network_model: NetworkModel
    """Driver that connects the pod."""
    network: NetworkNamespace | None = None
    """Its network namespace and interfaces, while it has them."""
    volumes: tuple[Volume, ...] = ()
    """Its volumes, those that were added later included."""
    sockets: tuple[Socket, ...] = ()
    """As given."""
    containers: tuple[ContainerStatus, ...] = ()
    """Its containers, in the order of creation."""
    on_disconnect: OnDisconnect = OnDisconnect()
    """As given."""
    leftovers: tuple[str, ...] = ()
    """What could not be freed on the host; ``pod.delete`` tries again."""
    phases_ms: dict[str, float] = {}
    """Milliseconds of each phase of the last start."""
    queue_position: int | None = None
    """While a start waits for others: 1 is next. In replies only, for it changes with every other start."""
    labels: dict[str, str] = {}
    """As given."""
    annotations: dict[str, str] = {}
    """As given."""
    mock: bool = False
    """True when no VM exists (mock hypervisor)."""


class Output(Blob):
    """One captured output stream."""

    truncated: bool = False
    """Whether more was written than is kept here (the first bytes are kept)."""
    total_bytes: int = 0
    """How many bytes were written in all."""


class ExecResult(Reply):
    """How a command inside a pod ended."""

    exit_code: int
    """Exit code: 127 not found, 126 not executable, 128+n ended by signal n."""
    timed_out: bool = False
    """Whether ``timeout_s`` passed and the command was killed."""
    stdout: Output = Output()
    """Captured standard output."""
    stderr: Output = Output()
    """Captured standard error."""
    duration_ms: float
    """Milliseconds from the request's arrival at the pod to the command's end."""


StopOutcome = Literal["graceful", "forced", "absent"]
