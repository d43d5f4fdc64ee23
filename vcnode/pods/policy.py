"""What the node's policy says to a request. Pure: settings and what is known go in, denials come out.

A request is searched for kinds of values, not asked for its verb: whatever names a path on the host, a
capability or a size is judged wherever it stands, also in commands that come later. The one caller is
`vcnode.pods.service.PodService.permit`, which every command that changes something passes first.
"""

from __future__ import annotations

import functools
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vcnode.errors import PermissionDeniedError
from vcnode.models.base import OnHost
from vcnode.models.capabilities import DEFAULT_CAPABILITIES
from vcnode.models.commands import ContainerCreate, ImageImport, ImagePull, PodExec
from vcnode.models.hooks import Hook, HostHook
from vcnode.models.hypervisor import HypervisorConfig
from vcnode.models.node import ImageStatus
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.models.records import PodRecord
from vcnode.models.secrets import HostSecret
from vcnode.models.sessions import SessionExec
from vcnode.settings import ImageRule, PolicySettings

DOCKER_HUB = "docker.io"
MAX_DENIALS = 20
"""Most denials that one error lists."""


@dataclass(frozen=True, slots=True)
class Denial:
    """One thing that is not allowed."""

    rule: str
    """The setting that forbids it, such as ``policy.capabilities``."""
    field: str
    """Where it stands in the request."""
    message: str
    """What is forbidden, and what would be allowed."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the node knows that a request only names."""

    images: Mapping[str, ImageStatus]
    """By name."""
    pods: Mapping[str, PodRecord]
    """By id."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A field somewhere in a request."""

    owner: BaseModel
    """The model that holds it."""
    name: str
    """Its name there."""
    path: str
    """Where that is in the request, such as ``pod.containers[0].cmd``."""
    content: Any


_JUDGED_MODELS = (PodSpec, HypervisorConfig, ContainerSpec)
"""Those of which `_model` judges the whole."""


def judge(request: BaseModel, policy: PolicySettings, known: Known) -> tuple[Denial, ...]:
    """Everything in *request* that the policy denies, in the order of its fields."""
    found = [*_whole(request, policy, known)]
    for value in _values(request, ""):
        found += _value(value, policy)
        if isinstance(value.content, BaseModel):
            found += _model(value.content, value.path, policy, known)
    return tuple(found)


def judge_digest(reference: str, digest: str, policy: PolicySettings) -> tuple[Denial, ...]:
    """The same for what a registry turned out to have under *reference*: the manifest of that digest."""
    return _image(reference, digest, "reference", policy)


def require(denials: Sequence[Denial]) -> None:
    """Raise PermissionDeniedError if there are any; it names the first, and has all as ``denials``."""
    if not denials:
        return
    first, more = denials[0], len(denials) - 1
    raise PermissionDeniedError(
        f"{first.field}: {first.message} (rule {first.rule}){f', and {more} more denials' if more else ''}.",
        rule=first.rule,
        field=first.field,
        denials=[{"rule": d.rule, "field": d.field, "message": d.message} for d in denials[:MAX_DENIALS]],
    )


def _values(model: BaseModel, where: str) -> Iterator[_Value]:
    """Every field of *model* and of the models in it that can tell something, item by item."""
    for name in _telling(type(model)):
        path = f"{where}.{name}" if where else name
        content = getattr(model, name)
        several = isinstance(content, tuple)
        for index, item in enumerate(content if several else (content,)):
            value = _Value(model, name, f"{path}[{index}]" if several else path, item)
            yield value
            if isinstance(item, BaseModel):
                yield from _values(item, value.path)


def _whole(request: BaseModel, policy: PolicySettings, known: Known) -> Iterator[Denial]:
    """What only the request as a whole tells."""
    if isinstance(request, ImageImport) and not policy.image_import:
        yield Denial("policy.image_import", "path", "images may not be made of files of the host")
    if isinstance(request, ImagePull):
        yield from _image(request.reference, None, "reference", policy)
    in_guest = isinstance(request, PodExec) or (
        isinstance(request, SessionExec) and request.container_id is None
    )
    if in_guest and not policy.guest_exec:
        yield Denial(
            "policy.guest_exec", "pod_id", "commands may run in containers only, not in the guest itself"
        )
    if isinstance(request, ContainerCreate) and (record := known.pods.get(request.pod_id)) is not None:
        there = [c.spec for c in record.containers if c.spec.id != request.container.id]
        yield from _containers([*there, request.container], "container", policy)


def _model(model: BaseModel, path: str, policy: PolicySettings, known: Known) -> Iterator[Denial]:
    """What only a model as a whole tells."""
    if isinstance(model, PodSpec):
        yield from _containers(model.containers, f"{path}.containers", policy)
    if isinstance(model, HypervisorConfig) and model.own_guest and not policy.own_guests:
        yield Denial("policy.own_guests", path, "pods may boot the node's own guest only")
    if isinstance(model, ContainerSpec):
        if model.cmd.capabilities is None:
            yield from _capabilities(DEFAULT_CAPABILITIES, f"{path}.cmd.capabilities", policy, default=True)
        if model.image is not None and (image := known.images.get(model.image)) is not None:
            yield from _known_image(image, f"{path}.image", policy)


def _value(value: _Value, policy: PolicySettings) -> Iterator[Denial]:
    """What one value tells by itself."""
    content = value.content
    if content is None:
        return
    match rule := _rule(type(value.owner), value.name):
        case "host_paths" | "secret_dirs" | "hook_dirs":
            yield from _below(content, rule, value.path, getattr(policy, rule))
        case "hook_env":
            yield from _listed(str(content).partition("=")[0], "policy.hook_env", value.path, policy.hook_env)
        case "capabilities":
            yield from _capabilities((content,), value.path, policy)
        case "devices" | "kernel_params" | "hypervisor_params":
            yield from _listed(_spelled(content), f"policy.{rule}", value.path, getattr(policy, rule))
        case "max_vcpu_count" | "max_mem_size_mib" if isinstance(content, int):
            yield from _at_most(content, rule, value.path, policy)


@functools.cache
def _rule(owner: type[BaseModel], name: str) -> str | None:
    """Name of the setting by which a field is judged by itself; None: it never is."""
    for mark, rule in ((OnHost, "host_paths"), (HostSecret, "secret_dirs"), (HostHook, "hook_dirs")):
        if name in _marked_fields(owner, mark):
            return rule
    if name == "env" and issubclass(owner, Hook):
        return "hook_env"
    if name == "capabilities" and issubclass(owner, Cmd):
        return "capabilities"
    if name in ("devices", "kernel_params", "hypervisor_params"):
        return name
    return f"max_{name}" if name in ("vcpu_count", "mem_size_mib") else None


@functools.cache
def _telling(model: type[BaseModel]) -> tuple[str, ...]:
    """Fields of *model* in which there can be anything to judge: most of a request needs no look.

    Every node of a fleet is asked for a bid for each pod, and judges it first.
    """
    return tuple(name for name in model.model_fields if _can_tell(model, name, frozenset()))


def _can_tell(model: type[BaseModel], name: str, above: frozenset[type[BaseModel]]) -> bool:
    """Whether the field is judged, or anything in the models that it can hold; *above* are those it is in."""
    if _rule(model, name) is not None:
        return True
    above |= {model}
    return any(
        inner is BaseModel
        or inner in above  # it holds its own kind: look
        or issubclass(inner, _JUDGED_MODELS)
        or any(_can_tell(inner, field, above) for field in inner.model_fields)
        for inner in _models_in(model.model_fields[name].annotation)
    )


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models that a value of that type can hold; `BaseModel` itself where the type does not say."""
    if annotation in (Any, object) or isinstance(annotation, typing.TypeVar):
        yield BaseModel
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for kind in annotation.__subclasses__():
            yield from _models_in(kind)
    for inner in typing.get_args(annotation):
        if inner is not None and not isinstance(inner, str | int):
            yield from _models_in(inner)


def _below(path: str, setting: str, field: str, allowed: Sequence[Path] | None) -> Iterator[Denial]:
    if allowed is None:
        return
    tidy = Path("/" + os.path.normpath(path).lstrip("/"))
    if not any(tidy.is_relative_to(root) for root in allowed):
        names = ", ".join(map(str, allowed)) or "nothing"
        yield Denial(f"policy.{setting}", field, f"{path!r} lies outside of what is allowed, {names}")


def _capabilities(
    wanted: Sequence[str], field: str, policy: PolicySettings, *, default: bool = False
) -> Iterator[Denial]:
    allowed = policy.capabilities
    if allowed is None or not (denied := [name for name in wanted if name not in allowed]):
        return
    names = ", ".join(allowed) or "none"
    what = "the default set has " if default else ""
    yield Denial(
        "policy.capabilities", field, f"{what}{', '.join(denied)}, which is not allowed; allowed: {names}"
    )


def _containers(specs: Sequence[ContainerSpec], field: str, policy: PolicySettings) -> Iterator[Denial]:
    """What all containers of one pod have together."""
    yield from _at_most(len(specs), "max_containers", field, policy)
    disks = sum(spec.wanted_disk_mib for spec in specs)
    yield from _at_most(disks, "max_disk_size_mib", field, policy)


def _at_most(wanted: int, setting: str, field: str, policy: PolicySettings) -> Iterator[Denial]:
    limit: int | None = getattr(policy, setting)
    if limit is not None and wanted > limit:
        unit = " MiB" if setting.endswith("_mib") else ""
        yield Denial(f"policy.{setting}", field, f"{wanted}{unit} is more than a pod may have, {limit}{unit}")


def _listed(text: str, rule: str, field: str, allowed: Sequence[str]) -> Iterator[Denial]:
    if not any(fnmatchcase(text, pattern) for pattern in allowed):
        yield Denial(rule, field, f"{text!r} is not allowed; allowed: {', '.join(allowed) or 'none'}")


def _spelled(content: object) -> str:
    """A device or parameter as the settings spell it: ``/dev/x``, ``name`` or ``name=value``."""
    if isinstance(content, BaseModel):
        fields = content.model_dump(mode="json", exclude_none=True)
        key = next((str(fields[n]) for n in ("key", "name", "path", "host_path") if n in fields), str(fields))
        return f"{key}={fields['value']}" if fields.get("value") not in (None, "") else key
    return str(content)


def _known_image(image: ImageStatus, field: str, policy: PolicySettings) -> Iterator[Denial]:
    if image.reference is not None:
        yield from _image(image.reference, image.manifest_digest, field, policy)
    elif not policy.image_import:
        yield Denial("policy.image_import", field, f"{image.name!r} was made of files of the host")
    elif policy.images is not None:
        yield Denial("policy.images", field, f"{image.name!r} was not pulled, so no rule fits it")


def _image(reference: str, digest: str | None, field: str, policy: PolicySettings) -> tuple[Denial, ...]:
    """An image of a registry; *digest* None: what it has there is not known yet, and will be judged then."""
    rules = policy.images
    if rules is None or any(_fits(rule, reference, digest) for rule in rules):
        return ()
    told = "; ".join(f"{r.registry}/{r.repository}{' by digest' * bool(r.digests)}" for r in rules)
    what = f"{reference!r}" if digest is None else f"{reference!r} with manifest {digest}"
    return (Denial("policy.images", field, f"{what} fits no rule; there are: {told or 'none'}"),)


def _fits(rule: ImageRule, reference: str, digest: str | None) -> bool:
    registry, repository, pinned = split_reference(reference)
    return (
        fnmatchcase(registry, rule.registry)
        and fnmatchcase(repository, rule.repository)
        and (not rule.digests or digest is None or bool({digest, pinned} & set(rule.digests)))
    )


def split_reference(reference: str) -> tuple[str, str, str | None]:
    """Registry, repository and digest of a reference. Source: distribution/reference, its grammar."""
    name, at, pinned = reference.partition("@")
    first, slash, rest = name.partition("/")
    if not (slash and ("." in first or ":" in first or first == "localhost")):
        first, rest = DOCKER_HUB, name
    head, slash, last = rest.rpartition("/")
    repository = f"{head}{slash}{last.partition(':')[0]}"
    if first == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return first, repository, pinned if at else None


@functools.cache
def _marked_fields(model: type[BaseModel], mark: type) -> frozenset[str]:
    """Fields of *model* that hold a path on the host, by the *mark* in their type."""
    return frozenset(
        name
        for name, field in model.model_fields.items()
        if any(isinstance(each, mark) for each in field.metadata) or _marked(field.annotation, mark)
    )


def _marked(annotation: Any, mark: type) -> bool:
    """Whether *mark* stands in ``Annotated[…]``, or in a union or tuple of such."""
    marks = getattr(annotation, "__metadata__", ())
    return any(isinstance(each, mark) for each in marks) or any(
        _marked(inner, mark) for inner in typing.get_args(annotation)
    )
