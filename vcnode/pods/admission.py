"""From a pod's spec to its first record: everything is checked before anything is kept."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from vcnode.drivers.base import ImageFile
from vcnode.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnsupportedError
from vcnode.models.hypervisor import HypervisorConfig
from vcnode.models.image import ImageConfig
from vcnode.models.network import NetworkModel
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentType, ContainerSpec, HypervisorType, PodSpec, PodState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.volumes import Volume
from vcnode.pods import features
from vcnode.pods.guests import access_of, check_files
from vcnode.pods.hooks import check_hooks
from vcnode.pods.marks import new_vm_id
from vcnode.pods.parts import Parts, driver
from vcnode.pods.process import NO_CONFIG, guest_process
from vcnode.pods.sockets import check_sockets
from vcnode.pods.volumes import check_mounts, check_volume
from vcnode.settings import Settings

_IN_OWN_GUESTS = frozenset({AgentType.HYPERSTART, AgentType.SSHD})
"""Agents that the node's own guest does not have."""


def new_id(prefix: str) -> str:
    """An id that nobody has: the prefix, ``-`` and 12 random hex digits."""
    return f"{prefix}-{secrets.token_hex(6)}"


def agent_type_of(spec: PodSpec, hypervisor: HypervisorType, settings: Settings) -> AgentType:
    """The agent of a pod: as asked for, else the node's, unless that cannot go with the hypervisor."""
    if spec.agent_type is not None:
        return spec.agent_type
    if hypervisor is settings.hypervisor or settings.agent is not None:
        return settings.agent_type
    return AgentType.MOCK if hypervisor is HypervisorType.MOCK else AgentType.NATIVE


@dataclass(frozen=True, slots=True)
class Admission:
    """Checks specs against what this node has."""

    parts: Parts

    async def pod(self, spec: PodSpec) -> PodRecord:
        """The record of a new pod in ``ready``.

        Args:
            spec: With its id.

        Raises:
            InvalidArgumentError: A value that cannot work; says which field (``pod.…``).
            NotFoundError: An image or a root directory that does not exist.
            UnsupportedError: A driver that this node lacks, or one that lacks what the pod needs.
            ResourceExhaustedError: More memory than the host has.
        """
        parts, settings = self.parts, self.parts.settings
        if spec.id is None:
            raise InvalidArgumentError.field("pod.id", "is missing")
        hypervisor_type = spec.hypervisor_type or settings.hypervisor
        agent_type = agent_type_of(spec, hypervisor_type, settings)
        network_model = spec.network_model or settings.network
        hypervisor = driver(parts.hypervisors, hypervisor_type, "pod.hypervisor_type")
        agent = driver(parts.agents, agent_type, "pod.agent_type")
        driver(parts.networks, network_model, "pod.network_model").check(spec.network)
        if agent_type is not AgentType.NOOP and agent.info.mock != hypervisor.info.mock:
            raise InvalidArgumentError.field(
                "pod.agent_type", f"{agent_type} does not go with hypervisor_type {hypervisor_type}"
            )
        _check_boots(spec, agent_type, hypervisor.info)
        _check_reachable(spec, agent_type, network_model)
        features.check_pod(spec, agent.info)
        taken = [channel.name for channel in agent.channels(spec.agent_config)]
        await check_sockets(spec, hypervisor.info, taken, parts.storage)
        for number, volume in enumerate(spec.volumes):
            await check_volume(
                volume,
                f"pod.volumes[{number}]",
                pod=spec,
                hypervisor=hypervisor,
                agent=agent,
                storage=parts.storage,
            )
        await check_hooks(parts.storage, spec.hooks)
        if spec.containers:
            self._check_containers_supported(agent_type, "pod.containers")
            features.check_policy(agent.info, spec.agent_config, settings.policy, "pod.agent_type")
        if not hypervisor.info.mock:
            self._check_memory(spec)
        _check_on_disconnect(spec, settings.nats.lease_s)
        hypervisor.check(spec.hypervisor_config, spec.resources)
        await check_files(parts.storage, spec.hypervisor_config)
        now = parts.clock()
        containers = [
            await self._container(_with_id(c), agent.info, spec, spec.volumes, f"pod.containers[{index}]")
            for index, c in enumerate(spec.containers)
        ]
        record = PodRecord(
            pod_id=spec.id,
            spec=spec,
            hypervisor_type=hypervisor_type,
            agent_type=agent_type,
            network_model=network_model,
            state=PodState.READY,
            created_at=now,
            volumes=spec.volumes,
            containers=tuple(containers),
            disk_id=new_vm_id(settings) if _has_overlay(spec.hypervisor_config) else None,
        )
        await access_of(parts, record)
        return record

    async def container(self, spec: ContainerSpec, pod: PodRecord) -> ContainerRecord:
        """The record of a container to add to *pod*, in ``ready``; raises as `pod`."""
        self._check_containers_supported(pod.agent_type, "container")
        info = self.parts.agent(pod).info
        features.check_policy(info, pod.spec.agent_config, self.parts.settings.policy, "container")
        return await self._container(_with_id(spec), info, pod.spec, pod.volumes, "container")

    async def volume(self, volume: Volume, pod: PodRecord) -> None:
        """See that *volume* can be added to *pod*. Raises as `check_volume`."""
        await check_volume(
            volume,
            "volume",
            pod=pod.spec,
            hypervisor=self.parts.hypervisor(pod),
            agent=self.parts.agent(pod),
            storage=self.parts.storage,
        )

    async def _container(
        self, spec: ContainerSpec, agent: DriverInfo, pod: PodSpec, volumes: Sequence[Volume], where: str
    ) -> ContainerRecord:
        features.check_container(spec, agent, pod.agent_config, where)
        check_mounts(volumes, pod, spec, where)
        digest, config = None, NO_CONFIG
        if spec.image is not None:
            file, config = await self._image(spec.image, f"{where}.image")
            digest = file.digest
        try:
            guest_process(spec, config)
        except InvalidArgumentError as exc:
            raise _placed(exc, where) from exc
        await self.parts.secrets.check(spec, where)
        if spec.rootfs is not None:
            await self._check_rootfs(spec.rootfs, f"{where}.rootfs")
        return ContainerRecord(
            spec=spec,
            image_digest=digest,
            image_config=config,
            layer_id=new_vm_id(self.parts.settings) if spec.writable == "disk" else None,
            created_at=self.parts.clock(),
        )

    async def _check_rootfs(self, path: str, field: str) -> None:
        try:
            await self.parts.storage.check_rootfs(path)
        except NotFoundError as exc:
            raise NotFoundError(f"{field}: {exc.message}", **{**exc.details, "field": field}) from exc
        except InvalidArgumentError as exc:
            raise InvalidArgumentError.field(field, exc.message) from exc

    async def _image(self, name: str, field: str) -> tuple[ImageFile, ImageConfig]:
        try:
            return await self.parts.images.resolve(name)
        except NotFoundError as exc:
            raise NotFoundError(f"{field}: {exc.message}", **{**exc.details, "field": field}) from exc

    def _check_containers_supported(self, agent_type: AgentType, field: str) -> None:
        agent = driver(self.parts.agents, agent_type, "agent_type")
        if "containers" not in agent.info.capabilities:
            raise UnsupportedError(
                f"{field}: agent_type {agent_type.value} cannot run containers.", field=field
            )

    def _check_memory(self, spec: PodSpec) -> None:
        wanted, total = spec.resources.mem_size_mib, self.parts.memory().total_mib
        if wanted > total:
            raise ResourceExhaustedError(
                f"pod.resources.mem_size_mib: {wanted} MiB is more than the host has ({total} MiB).",
                field="pod.resources.mem_size_mib",
                wanted_mib=wanted,
                total_mib=total,
            )


def _has_overlay(config: HypervisorConfig) -> bool:
    return config.image_path is not None and not config.image_writable


def _check_boots(spec: PodSpec, agent_type: AgentType, hypervisor: DriverInfo) -> None:
    """See that the hypervisor can boot what the pod names, and that the agent may be in there."""
    config = spec.hypervisor_config
    for name in (*config.files, *(("image_path",) if config.image_path is not None else ())):
        if name.removesuffix("_path") not in hypervisor.capabilities:
            field = f"pod.hypervisor_config.{name}"
            raise UnsupportedError(f"{field}: hypervisor_type {hypervisor.type} cannot do that.", field=field)
    if agent_type in _IN_OWN_GUESTS and not (config.initrd_path or config.image_path):
        raise InvalidArgumentError.field(
            "pod.hypervisor_config",
            f"needs initrd_path or image_path: the node's own guest has no agent of type {agent_type}",
        )

    if spec.template == "require" and not config.is_default:
        raise InvalidArgumentError.field(
            "pod.template",
            "cannot be 'require' for a pod with a hypervisor_config, which boots; leave it out",
        )


def _check_reachable(spec: PodSpec, agent_type: AgentType, network_model: NetworkModel) -> None:
    """See that an agent over the network has one."""
    if (
        agent_type is AgentType.SSHD
        and network_model is NetworkModel.NOOP
        and spec.agent_config.sshd.server is None
    ):
        raise InvalidArgumentError.field(
            "pod.network_model",
            "gives the guest no address at which the agent sshd could reach it; take another, or set "
            "agent_config.sshd.server",
        )


def _check_on_disconnect(spec: PodSpec, lease_s: float) -> None:
    after_s = spec.on_disconnect.after_s
    if after_s is not None and after_s < lease_s:
        raise InvalidArgumentError.field(
            "pod.on_disconnect.after_s",
            f"must be at least {lease_s:g}, this node's nats.lease_s: so long it may go unheard",
        )


def _with_id(spec: ContainerSpec) -> ContainerSpec:
    return spec if spec.id is not None else spec.model_copy(update={"id": new_id("ctr")})


def _placed(exc: InvalidArgumentError, where: str) -> InvalidArgumentError:
    """The error, with its field as it stands in the request."""
    violations = exc.details.get("violations") or [{"field": "", "message": exc.message}]
    return InvalidArgumentError.field(f"{where}.{violations[0]['field']}", violations[0]["message"])
