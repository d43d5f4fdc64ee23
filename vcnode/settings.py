"""All settings of a node agent, in one frozen model.

Precedence, lowest first: defaults, the TOML file, ``VCNODE_*`` environment variables, flags. A group's
setting is ``[nats] url = …`` in the file and ``VCNODE_NATS_URL`` in the environment.
"""

from __future__ import annotations

import os
import re
import socket
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from vcnode.models.base import Labels, NodeName
from vcnode.models.fleet import Taint
from vcnode.models.network import IpAddress, NetworkModel
from vcnode.models.pod import (
    MAX_MEM_SIZE_MIB,
    MAX_VCPU_COUNT,
    MIN_MEM_SIZE_MIB,
    AgentType,
    HypervisorType,
)


def default_node_name() -> str:
    """The host's name, made to fit the alphabet of ids."""
    name = re.sub(r"[^a-z0-9_-]", "-", socket.gethostname().split(".")[0].lower())
    return name.strip("-_")[:64].rstrip("-_") or "node"


class Group(BaseModel):
    """Base of a group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NatsSettings(Group):
    """How to reach NATS."""

    url: str = "nats://127.0.0.1:4222"
    """Server URLs, separated by commas."""
    prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")] = "vcnode"
    """First token of every subject."""
    creds_file: Path | None = None
    """Credentials file (JWT and seed)."""
    nkey_seed_file: Path | None = None
    """File with an nkey seed."""
    user: str | None = None
    """User name."""
    password_file: Path | None = None
    """File with the user's password."""
    token_file: Path | None = None
    """File with a token."""
    tls_ca_file: Path | None = None
    """CA certificates to trust; turns TLS on."""
    tls_cert_file: Path | None = None
    """Client certificate."""
    tls_key_file: Path | None = None
    """Key of the client certificate."""
    tls_hostname: str | None = None
    """Name expected in the server's certificate, if it differs from the URL's host."""
    inbox_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")] = "_INBOX"
    """Where replies to this client arrive; permissions may give it a place of its own (docs/security.md)."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Limit of one attempt to connect."""
    stream_replicas: int = Field(default=1, ge=1, le=5)
    """Replicas of the streams and buckets that this node makes; those that exist are never changed."""
    stream_max_age_s: float = Field(default=7 * 86_400, gt=0)
    """Age in seconds at which the event stream forgets, when this node is the one to create it."""
    command_max_age_s: float = Field(default=7 * 86_400, gt=0)
    """Age in seconds at which a durable command that nobody took is dropped, if this node makes the queue."""
    stream_storage: Literal["file", "memory"] = "file"
    """Where streams and buckets are kept that this node makes; ``memory`` ends with the NATS server."""
    actor: str | None = Field(default=None, min_length=1, max_length=256)
    """What a client says of itself with each command; audit events have it as a claim. Default: on the
    command line the user's name and host, else nothing."""
    trust_request_info: bool = False
    """Whether the header ``Nats-Request-Info`` of a command can only be the NATS server's own: set it where
    all commands come from other accounts. Audit events then call their sender verified."""
    lease_s: float = Field(default=30.0, ge=1)
    """Seconds after which a node that is not heard of loses its name; renewed three times as often."""


SpawnerType = Literal["none", "nsenter"]
"""Drivers that start the processes of pods."""


class QemuSettings(Group):
    """How VMs are run."""

    binary: str | None = None
    """QEMU, by name or path. Default: ``qemu-system-x86_64`` or ``qemu-system-aarch64``, as the host is."""
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    """``auto`` boots a guest to see whether KVM really works, remembers the answer, and says so."""
    tcg_cache_mib: int = Field(default=128, ge=16, le=2048)
    """Most memory of a VM without KVM for the code that QEMU has translated. When it is full, QEMU starts
    over. A start needs some 30; what a VM has once used of it, it keeps while it is idle."""
    probe_timeout_s: float = Field(default=10.0, gt=0)
    """Limit of that test boot."""
    spawner: SpawnerType = "nsenter"
    """Where QEMU and the processes that help it run: in the pod's network namespace (``nsenter``), or in the
    node agent's (``none``), where the pod's interfaces are not counted in its stats."""
    boot_timeout_s: float = Field(default=60.0, gt=0)
    """Limit from the launch of a VM to the first answer of its agent."""
    uid_base: int | None = Field(default=None, ge=1000, le=4_000_000_000)
    """First of the host's user ids under which QEMU runs, one for each VM, without any capability; nobody
    else may have them. VMs that host directories are shared with (``rootfs``) still need root. Default: all
    VMs run as the node agent's user."""
    uid_count: int = Field(default=65_536, ge=1, le=1_000_000)
    """How many user ids there are from ``uid_base`` on."""
    cgroup_limits: bool = True
    """Whether a VM's cgroup bounds its memory, CPU and processes to what its size explains."""
    io_max_mib_per_s: float | None = Field(default=None, gt=0)
    """Most that a VM reads, and writes, on the disk of ``state_dir`` in a second. Default: no limit."""
    console_max_bytes: int = Field(default=256 * 1024, ge=4096)
    """Size at which a VM's console log is rotated; one older file is kept."""


class ShapeSettings(Group):
    """The size of a VM."""

    vcpu_count: int = Field(default=1, ge=1, le=MAX_VCPU_COUNT)
    """Virtual CPUs."""
    mem_size_mib: int = Field(default=256, ge=MIN_MEM_SIZE_MIB, le=MAX_MEM_SIZE_MIB)
    """Guest memory in MiB."""


class PoolSettings(ShapeSettings):
    """Spare VMs of one size."""

    spares: int = Field(default=1, ge=0, le=1000)
    """How many wait; 0 turns it off."""

    @property
    def size(self) -> tuple[int, int]:
        """CPUs and MiB."""
        return self.vcpu_count, self.mem_size_mib


class TemplateSettings(Group):
    """Booted VMs that pods are copied from."""

    warm: tuple[ShapeSettings, ...] = ()
    """Shapes whose template is made or loaded when the node starts, before a pod asks for it."""
    max_total_mib: int = Field(default=4096, ge=0)
    """Space of all templates on disk; beyond it, those that were not used for longest go first."""
    max_age_s: float = Field(default=7 * 86_400, gt=0)
    """Seconds after whose last use a template goes, unless it is one to warm or of the pool."""


class ImageSettings(Group):
    """Where images come from, and how much room they get."""

    concurrent_pulls: int = Field(default=2, ge=1, le=64)
    """Pulls in progress at once; more wait."""
    progress_interval_s: float = Field(default=1.0, ge=0.1, le=60)
    """Seconds between two ``image.pulling`` events of one pull."""
    max_size_mib: int = Field(default=16 * 1024, ge=1)
    """Largest image, unpacked; larger ones are refused."""
    cert_dir: Path | None = None
    """Directory with CA (``*.crt``) and client certificates of registries. Default: the system's certs.d."""
    auth_file: Path | None = None
    """Credentials of registries (containers-auth.json) for pulls that bring none. Default: anonymous."""
    policy_file: Path | None = None
    """Signature policy (containers-policy.json). Default: anything is accepted."""
    gc_high_mib: int = Field(default=32 * 1024, ge=0)
    """When image files take more than this, unused images are removed."""
    gc_low_mib: int = Field(default=24 * 1024, ge=0)
    """Until the files take no more than this; those that were not used for longest go first."""
    gc_min_age_s: float = Field(default=3600, ge=0)
    """Images that were made or used within so many seconds stay."""


MIN_MTU, MIN_MTU_IPV6 = 576, 1280
"""Bytes that any host takes, and any link must carry. Source: RFC 791, 3.1; RFC 8200, 5."""
MIN_SUBNET_BITS = 4
"""Half of it is the node's own network, with places for five pods then."""


class BridgeSettings(Group):
    """How network model ``bridge`` connects pods."""

    subnet4: IPv4Network | None = IPv4Network("10.119.0.0/16")
    """Subnet from which pods get their IPv4 addresses; its first one is the host's. Empty: no IPv4."""
    subnet6: IPv6Network | None = IPv6Network("fd76:636e:6f64::/64")
    """The same for IPv6."""
    mtu: int | None = Field(default=None, ge=MIN_MTU, le=65521)
    """Maximum transmission unit in bytes; with IPv6 at least 1280. Default: that of the interface that leads
    to the outside."""
    masquerade: bool = True
    """Whether pods reach the outside, with the host's address; turns the host's forwarding on."""
    dns_servers: tuple[IpAddress, ...] = ()
    """Name servers of pods that bring none. Default: the host's, but for those on its loopback."""
    nft_timeout_s: float = Field(default=10.0, gt=0)
    """Limit of one change of the nftables table."""

    @field_validator("subnet4", "subnet6", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        """Neither TOML nor an environment has a word for None."""
        return None if value == "" else value

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        for subnet in (self.subnet4, self.subnet6):
            if subnet is not None and subnet.max_prefixlen - subnet.prefixlen < MIN_SUBNET_BITS:
                raise ValueError(f"{subnet} is too small for pods: give it {1 << MIN_SUBNET_BITS} addresses")
        if self.mtu is not None and self.mtu < MIN_MTU_IPV6 and self.subnet6 is not None:
            raise ValueError("mtu must be at least 1280 with IPv6; set subnet6 to '' for none")
        return self


class RestartSettings(Group):
    """How long restart policies wait."""

    backoff_s: float = Field(default=1.0, ge=0.001)
    """Seconds before the first restart; doubled for each further one in a row."""
    backoff_max_s: float = Field(default=300.0, ge=0.001)
    """Most seconds before a restart."""
    reset_after_s: float = Field(default=600.0, ge=0)
    """What has run for so many seconds was healthy: its next restart counts as the first."""


class CniSettings(Group):
    """How network model ``cni`` finds its plugins."""

    conf_dir: Path = Path("/etc/cni/net.d")
    """Network configurations (``*.conflist``, ``*.conf``, ``*.json``); the first by name is the default."""
    bin_dirs: tuple[Path, ...] = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    """Where plugins are; the first directory that has one wins."""
    timeout_s: float = Field(default=20.0, gt=0)
    """Limit of one call of a plugin."""
    gc: bool = False
    """Whether plugins forget at the node's start what is none of its pods' (GC of CNI 1.1). Only when nobody
    else on the host uses these networks."""


class CnmSettings(Group):
    """Which namespaces network model ``cnm`` takes."""

    allowed_dirs: tuple[Path, ...] = (
        Path("/run/netns"),
        Path("/var/run/netns"),
        Path("/run/docker/netns"),
        Path("/var/run/docker/netns"),
    )
    """A pod's ``netns_path`` must lie below one of these."""


ImageDigest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Capability = Annotated[str, StringConstraints(pattern=r"^CAP_[A-Z_]+$")]


class ImageRule(Group):
    """Images that may run here. All that is given must fit; ``*`` stands for any letters."""

    registry: str = "*"
    """Where it is pulled from, such as ``registry.example`` or ``docker.io``."""
    repository: str = "*"
    """Its name there, without tag, such as ``team/*``."""
    digests: tuple[ImageDigest, ...] = ()
    """Its manifest must have one of these digests. Default: any."""


class TracingSettings(Group):
    """Where traces go. Certificates and headers are taken from OpenTelemetry's own environment variables
    (``OTEL_EXPORTER_OTLP_CERTIFICATE``, ``OTEL_EXPORTER_OTLP_HEADERS``, …). Needs ``vcnode[otel]``."""

    endpoint: str = Field(default="", pattern=r"^(https?://.+)?$")
    """Takes spans by OTLP over HTTP, such as ``http://collector:4318/v1/traces``. Default: no spans are made,
    and the traces of senders are passed on."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the commands that begin a trace, of those whose sender has none; what he traces is traced."""


class PolicySettings(Group):
    """What callers may ask for, whoever they are. A refusal (``permission_denied``) names the setting here.
    Without this group everything is allowed but secrets in files of the host, its devices, hooks, and
    parameters of kernel and hypervisor."""

    host_paths: tuple[Path, ...] | None = None
    """Roots, volumes and imports must lie below one of these, which must lie below ``allowed_roots``; links
    that lead out of them are not followed. Default: ``allowed_roots``."""
    images: tuple[ImageRule, ...] | None = None
    """Images that may be pulled and run. Default: any. ``[[policy.images]]`` in the file."""
    image_import: bool = True
    """Whether images may be made of files of the host, and run; such images fit no rule of ``images``."""
    own_guests: bool = True
    """Whether pods may boot a kernel, initramfs or disk image of the host instead of the node's own guest."""
    capabilities: tuple[Capability, ...] | None = None
    """Capabilities that containers and what is executed in them may have; those that name none want the
    default set (docs/containers.md). Default: any. They reach no further than the pod's own guest."""
    guest_exec: bool = True
    """Whether commands may run in a guest itself, outside of its containers, with all capabilities there."""
    secret_dirs: tuple[Path, ...] = ()
    """Directories of the host whose files may be given to containers as secrets. Default: none. What lies
    there can be had by everybody who may command the node; links that lead out are not followed."""
    hook_dirs: tuple[Path, ...] = ()
    """Directories of the host whose programs pods may have run as hooks, with the rights of the node agent;
    only what its user alone can change is run, links that lead out are not followed. Default: none."""
    hook_env: tuple[str, ...] = ("HOOK_*",)
    """Variables that pods may set for hooks, such as ``HOOK_*``. Whoever sets ``*`` free gives its users the
    host: ``LD_PRELOAD`` is one."""
    devices: tuple[str, ...] = ()
    """Devices of the host that pods may have, as paths; ``*`` stands for any letters. Default: none."""
    kernel_params: tuple[str, ...] = ()
    """Parameters that pods may give their guest's kernel, such as ``quiet`` or ``loglevel=*``. Default:
    none."""
    hypervisor_params: tuple[str, ...] = ()
    """Parameters that pods may give their hypervisor. Whoever sets one free gives its users the host: QEMU
    opens what its arguments name. Default: none."""
    max_vcpu_count: int | None = Field(default=None, ge=1)
    """Most virtual CPUs of one pod. Default: no limit but the model's."""
    max_mem_size_mib: int | None = Field(default=None, ge=1)
    """Most memory of one pod in MiB."""
    max_disk_size_mib: int | None = Field(default=None, ge=0)
    """Most MiB of all writable disks of one pod together."""
    max_containers: int | None = Field(default=None, ge=0)
    """Most containers of one pod."""


class SecretSettings(Group):
    """Keys that open sealed secrets, besides the node's own, which it makes in ``state_dir``."""

    key_files: tuple[Path, ...] = ()
    """Files with a seed (``SX…``) each, such as one that the whole fleet shares: what is sealed for it opens
    on every node that has it. ``vcnode secret key`` makes one."""


class LogSettings(Group):
    """What is kept of the output of containers, each by itself."""

    max_file_mib: int = Field(default=10, ge=1, le=1024)
    """Size at which a log goes on in another file."""
    max_files: int = Field(default=3, ge=1, le=1000)
    """Files of a log that are kept; the oldest go first."""
    min_free_mib: int = Field(default=256, ge=0)
    """With less room than this on the disk nothing is written; what is dropped then is counted and said."""
    max_mib_per_s: float = Field(default=8.0, gt=0)
    """Most that is taken from one pod in a second; what comes faster is dropped in the guest, and said."""


class LimitSettings(Group):
    """Bounds that keep one caller from hurting the others."""

    concurrent_commands: int = Field(default=64, ge=1)
    """Commands in progress at once; more get ``resource_exhausted``."""
    concurrent_waits: int = Field(default=1024, ge=1)
    """Commands that only wait (``container.wait``), besides; more get ``resource_exhausted``."""
    concurrent_starts: int = Field(default_factory=lambda: max(2, len(os.sched_getaffinity(0))), ge=1)
    """Pods starting at once; more wait. Default: the CPUs that the node agent may use, 2 at least: starting
    is work for a CPU, and more at once only make each slower."""
    queued_starts: int = Field(default=256, ge=0)
    """Pods waiting to start; more get ``resource_exhausted``."""
    pods: int = Field(default=500, ge=1)
    """Pods that the node holds, in any state."""
    sessions: int = Field(default=256, ge=1)
    """Sessions (exec, attach, copy, forward) open at once; more get ``resource_exhausted``."""
    session_window_bytes: int = Field(default=2 * 1024 * 1024, ge=64 * 1024, le=16 * 1024 * 1024)
    """Bytes of one stream of a session that are kept until its client has taken them."""
    request_bytes: int = Field(default=512 * 1024, ge=1024)
    """Largest request body."""
    journal_entries: int = Field(default=100_000, ge=100)
    """Stored replies kept; the oldest go first."""
    journal_age_s: float = Field(default=7 * 86_400, gt=0)
    """Age in seconds at which a stored reply is forgotten."""
    outbox_events: int = Field(default=1_000_000, ge=100)
    """Unpublished events kept; at the bound, commands that change something get ``resource_exhausted``."""
    outbox_retention_s: float = Field(default=86_400, ge=0)
    """Seconds for which published events stay in the local outbox."""


class StatsSettings(Group):
    """What is told of each pod as metrics; ``pod.stats`` tells it at any time."""

    pod_series: bool = True
    """Whether there are metrics of each pod: at most 40 series, of which the host's kernel counts 12. They
    are read when somebody scrapes; no guest is woken."""
    guest_interval_s: float = Field(default=0.0, ge=0)
    """Seconds between two questions to a guest for the metrics of its containers, as long as somebody
    scrapes; each wakes the guest. 0: no such metrics."""


class CapacitySettings(Group):
    """What pods may have of the host. Unset: what the host has, or, on a mock node, more than enough."""

    vcpu_count: int | None = Field(default=None, ge=1)
    """CPUs."""
    mem_mib: int | None = Field(default=None, ge=1)
    """Memory in MiB."""
    disk_mib: int | None = Field(default=None, ge=0)
    """For the writable disks of containers, in MiB. Default: the size of ``state_dir``'s file system."""
    reserved_mem_mib: int = Field(default=512, ge=0)
    """Memory that is kept for the host itself."""
    cpu_overcommit: float = Field(default=16.0, gt=0)
    """Virtual CPUs for each CPU."""
    mem_overcommit: float = Field(default=1.0, gt=0)
    """Guest memory for each MiB of the host's; above 1, pods that use all of theirs can starve each other."""
    disk_overcommit: float = Field(default=1.0, gt=0)
    """Size of disks for each MiB of the host's; they are sparse."""
    vm_overhead_mib: int = Field(default=64, ge=0)
    """Memory that a VM takes on the host besides its guest's. The default has room for a clone without KVM
    that does little; docs/stats.md has what was measured, and how."""


class Settings(BaseSettings):
    """Settings of one node agent."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="VCNODE_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        use_attribute_docstrings=True,
    )

    config_file: ClassVar[Path | None] = None

    node_name: NodeName = Field(default_factory=default_node_name)
    """Name of this node: a subject token, unique in the fleet."""
    state_dir: Path = Path("/var/lib/vcnode")
    """Database, images, accelerator probe: survives reboots."""
    run_dir: Path = Path("/run/vcnode")
    """Sockets and directories of running VMs; keep the path short (UNIX socket paths end at 107 bytes)."""
    guest_dir: Path = Path("/var/lib/vcnode/guest")
    """Guest image, as made by ``vcnode guest build``."""
    allowed_roots: tuple[Path, ...] = (Path("/var/lib/vcnode/roots"), Path("/srv"))
    """Host paths in commands must lie under one of these."""
    hypervisor: HypervisorType = HypervisorType.QEMU
    """Used when a pod names none."""
    agent: AgentType | None = None
    """Used when a pod names none. Default: ``native`` with QEMU, ``mock`` with the mock hypervisor."""
    network: NetworkModel = NetworkModel.BRIDGE
    """Used when a pod names none."""
    labels: Labels = {}
    """Labels of this node, by which schedulers choose; ``node.label`` changes them while it runs."""
    taints: tuple[Taint, ...] = ()
    """Reasons for pods to stay away: only pods that tolerate all of them are bid for."""
    on_terminate: Literal["leave", "stop"] = "leave"
    """What SIGTERM does with pods: they go on for the next process, or they are drained first."""
    terminate_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds that such a drain may take."""
    stop_grace_s: float = Field(default=10.0, ge=0, le=3600)
    """Default of ``pod.stop``: seconds that containers and guest may take."""
    audit_interval_s: float = Field(default=300.0, ge=0)
    """Seconds between two looks for what is on the host and no pod's, which is removed; 0: at start only."""
    audit_events: bool = True
    """Whether an event ``audit.*`` tells of each command that may change something: who, what, what came of
    it."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """Seconds that running commands may take when the node agent stops."""
    metrics_address: str = "127.0.0.1:9750"
    """Where metrics and health are served; port 0 takes a free one, an empty string turns it off."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """``auto``: text on a terminal, JSON otherwise."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""
    faults: str = ""
    """Fault plan of the mock hypervisor, such as ``hypervisor.launch:2=fail``; failpoints (``kill``) of any
    (docs/mock.md)."""
    nats: NatsSettings = NatsSettings()
    qemu: QemuSettings = QemuSettings()
    templates: TemplateSettings = TemplateSettings()
    pool: tuple[PoolSettings, ...] = ()
    """VMs of the default drivers that wait, resumed and paused again, for pods of their size."""
    images: ImageSettings = ImageSettings()
    bridge: BridgeSettings = BridgeSettings()
    restarts: RestartSettings = RestartSettings()
    cni: CniSettings = CniSettings()
    cnm: CnmSettings = CnmSettings()
    policy: PolicySettings = PolicySettings()
    tracing: TracingSettings = TracingSettings()
    secrets: SecretSettings = SecretSettings()
    logs: LogSettings = LogSettings()
    stats: StatsSettings = StatsSettings()
    limits: LimitSettings = LimitSettings()
    capacity: CapacitySettings = CapacitySettings()

    @model_validator(mode="after")
    def _policy_within_the_roots(self) -> Self:
        for path in self.policy.host_paths or ():
            if not any(path.is_relative_to(root) for root in self.allowed_roots):
                raise ValueError(f"policy.host_paths: {path} must lie below one of allowed_roots")
        return self

    @property
    def host_paths(self) -> tuple[Path, ...]:
        """Directories below which host paths of commands must lie."""
        return self.allowed_roots if self.policy.host_paths is None else self.policy.host_paths

    @property
    def agent_type(self) -> AgentType:
        """The default agent driver, as set or as it follows from the hypervisor."""
        if self.agent is not None:
            return self.agent
        return AgentType.MOCK if self.hypervisor is HypervisorType.MOCK else AgentType.NATIVE

    @classmethod
    def load(cls, file: Path | None = None, **flags: Any) -> Settings:
        """Read file and environment, with *flags* on top (None values count as not given).

        Raises:
            pydantic.ValidationError: A value is wrong; the error names the setting.
            OSError, tomllib.TOMLDecodeError: The file cannot be read.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        if file is None:
            return cls(**given)

        class FromFile(cls):  # type: ignore[misc, valid-type]
            config_file: ClassVar[Path | None] = file

        loaded: Settings = FromFile(**given)
        return loaded

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags over environment over file."""
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if cls.config_file is not None:
            if not cls.config_file.is_file():
                raise FileNotFoundError(f"No settings file at {cls.config_file}.")
            sources += (TomlConfigSettingsSource(settings_cls, toml_file=cls.config_file),)
        return sources
