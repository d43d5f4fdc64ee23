"""What the node's policy denies, by which rule, and where it is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ValidationError

from tests.support.cli import vcnode
from tests.unit.handlers.fakes import World as Handlers
from tests.unit.pods.test_fleet import ask, fleet_of
from tests.unit.pods.world import World, container, pod
from vcnode.contracts.payloads import PAYLOADS
from vcnode.errors import InvalidArgumentError, PermissionDeniedError
from vcnode.models import wire
from vcnode.models.base import HostPath, Request
from vcnode.models.capabilities import DEFAULT_CAPABILITIES
from vcnode.models.commands import (
    COMMANDS,
    ContainerCreate,
    ContainerExec,
    ImageImport,
    ImagePull,
    PodAttachVolume,
    PodCreate,
    PodExec,
)
from vcnode.models.hooks import Hook, Hooks
from vcnode.models.network import DnsConfig
from vcnode.models.node import ImageStatus
from vcnode.models.pod import Cmd, ContainerSpec, HypervisorConfig, Resources
from vcnode.models.sessions import SessionExec
from vcnode.models.volumes import Socket, Volume
from vcnode.pods import policy
from vcnode.pods.policy import Known, judge, judge_digest, require, split_reference
from vcnode.settings import ImageRule, PolicySettings, Settings

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
NOTHING = Known({}, {})
OWN_KERNEL = HypervisorConfig(kernel_path="/srv/b/vmlinux")


def image(name: str, reference: str | None = None, manifest: str | None = None) -> ImageStatus:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return ImageStatus(
        name=name, digest=OTHER, size_bytes=1, imported_at=now, reference=reference, manifest_digest=manifest
    )


IMAGES = Known(
    {
        "app": image("app", "registry.example/team/app:1", DIGEST),
        "other": image("other", "docker.io/other", OTHER),
        "made": image("made"),
    },
    {},
)
TEAM = (ImageRule(registry="registry.example", repository="team/*"),)
CAPS = container(cmd=Cmd(args=("a",), capabilities=("CAP_CHOWN", "CAP_SYS_ADMIN")))
RUN = Cmd(args=("a",))
HOOKS = Hooks(post_stop=(Hook(path="/etc/hooks/a", env=("HOOK_A=b",)),))


def denied(request: Request, known: Known = IMAGES, **rules: Any) -> list[tuple[str, str]]:
    return [(d.rule, d.field) for d in judge(request, PolicySettings(**rules), known)]


def create(*containers: ContainerSpec, **fields: Any) -> PodCreate:
    return PodCreate(pod=pod(containers=containers, **fields))


@pytest.mark.parametrize(
    ("request_", "rules", "denials"),
    [
        (create(CAPS), {}, []),
        (
            create(CAPS),
            {"capabilities": ("CAP_CHOWN",)},
            [("capabilities", "pod.containers[0].cmd.capabilities[1]")],
        ),
        (create(container()), {"capabilities": ()}, [("capabilities", "pod.containers[0].cmd.capabilities")]),
        (create(container()), {"capabilities": DEFAULT_CAPABILITIES}, []),
        (
            ContainerExec(pod_id="p", container_id="c", cmd=CAPS.cmd),
            {"capabilities": ("CAP_CHOWN",)},
            [("capabilities", "cmd.capabilities[1]")],
        ),
        (ContainerExec(pod_id="p", container_id="c", cmd=RUN), {"capabilities": ()}, []),
        (create(container(rootfs="/srv/a/x")), {"host_paths": ("/srv/a",)}, []),
        (
            create(container(rootfs="/srv/ab")),
            {"host_paths": ("/srv/a",)},
            [("host_paths", "pod.containers[0].rootfs")],
        ),
        (
            create(container(rootfs="/srv/a/../b")),
            {"host_paths": ("/srv/a",)},
            [("host_paths", "pod.containers[0].rootfs")],
        ),
        (ImageImport(name="x", path="/etc"), {"host_paths": ()}, [("host_paths", "path")]),
        (ImageImport(name="x", path="/srv/a"), {"image_import": False}, [("image_import", "path")]),
        (
            create(container(image="made")),
            {"image_import": False},
            [("image_import", "pod.containers[0].image")],
        ),
        (create(container(image="made")), {"images": TEAM}, [("images", "pod.containers[0].image")]),
        (create(container(image="app")), {"images": TEAM}, []),
        (create(container(image="other")), {"images": TEAM}, [("images", "pod.containers[0].image")]),
        (
            create(container(image="app")),
            {"images": (ImageRule(digests=(OTHER,)),)},
            [("images", "pod.containers[0].image")],
        ),
        (create(container(image="app")), {"images": (ImageRule(digests=(DIGEST,)),)}, []),
        (create(container(image="unknown")), {"images": TEAM}, []),  # answered by not_found
        (ImagePull(reference="registry.example/team/app:2"), {"images": TEAM}, []),
        (ImagePull(reference="registry.example:5000/team/app"), {"images": TEAM}, [("images", "reference")]),
        (
            ImagePull(reference="app"),
            {"images": (ImageRule(registry="docker.io", repository="library/*"),)},
            [],
        ),
        (ImagePull(reference="app"), {"images": ()}, [("images", "reference")]),
        (create(hypervisor_config=OWN_KERNEL), {}, []),
        (
            create(hypervisor_config=OWN_KERNEL),
            {"own_guests": False},
            [("own_guests", "pod.hypervisor_config")],
        ),
        (create(), {"own_guests": False}, []),
        (
            create(hypervisor_config=OWN_KERNEL),
            {"host_paths": ("/srv/a",)},
            [("host_paths", "pod.hypervisor_config.kernel_path")],
        ),
        (
            create(volumes=(Volume(mount_tag="v", host_path="/srv/b"),)),
            {"host_paths": ("/srv/a",)},
            [("host_paths", "pod.volumes[0].host_path")],
        ),
        (
            PodAttachVolume(pod_id="p", volume=Volume(mount_tag="v", device="/srv/b", fs="ext4")),
            {"host_paths": ("/srv/a",)},
            [("host_paths", "volume.device")],
        ),
        (
            create(sockets=(Socket(name="s", host_path="/srv/b"),)),
            {"host_paths": ("/srv/a",)},
            [("host_paths", "pod.sockets[0].host_path")],
        ),
        (create(hooks=HOOKS), {}, [("hook_dirs", "pod.hooks.post_stop[0].path")]),
        (create(hooks=HOOKS), {"hook_dirs": ("/etc/hooks",)}, []),
        (
            create(hooks=Hooks(pre_start=(Hook(path="/etc/hooks/a", env=("LD_PRELOAD=/srv/x.so",)),))),
            {"hook_dirs": ("/etc/hooks",)},
            [("hook_env", "pod.hooks.pre_start[0].env[0]")],
        ),
        (PodExec(pod_id="p", cmd=RUN), {"guest_exec": False}, [("guest_exec", "pod_id")]),
        (SessionExec(pod_id="p", cmd=RUN), {"guest_exec": False}, [("guest_exec", "pod_id")]),
        (SessionExec(pod_id="p", container_id="c", cmd=RUN), {"guest_exec": False}, []),
        (
            create(resources=Resources(vcpu_count=4, mem_size_mib=512)),
            {"max_vcpu_count": 2, "max_mem_size_mib": 256},
            [
                ("max_vcpu_count", "pod.resources.vcpu_count"),
                ("max_mem_size_mib", "pod.resources.mem_size_mib"),
            ],
        ),
        (
            create(container("a"), container("b")),
            {"max_containers": 1},
            [("max_containers", "pod.containers")],
        ),
        (
            create(*(container(n, image="app", writable="disk", disk_size_mib=64) for n in "ab")),
            {"max_disk_size_mib": 100},
            [("max_disk_size_mib", "pod.containers")],
        ),
    ],
)
def test_what_is_denied_names_its_rule_and_field(
    request_: Request, rules: dict[str, Any], denials: list[tuple[str, str]]
) -> None:
    assert denied(request_, **rules) == [(f"policy.{rule}", field) for rule, field in denials]
    # Without rules all of these are allowed, but hooks.
    assert [rule for rule, _ in denied(request_) if not rule.startswith("policy.hook_")] == []


class Param(Request):
    """A parameter as the settings spell it."""

    key: str
    value: str = ""


class Later(Request):
    """A command that does not exist: what it names is judged all the same."""

    volumes: tuple[HostPath, ...] = ()
    kernel_params: tuple[Param | str, ...] = ()
    devices: tuple[HostPath, ...] | None = None


def test_values_are_judged_wherever_they_stand() -> None:
    request = Later(volumes=("/srv/a", "/etc"), kernel_params=(Param(key="quiet"), "init=/bin/sh"))
    assert denied(request, host_paths=("/srv",)) == [
        ("policy.host_paths", "volumes[1]"),
        ("policy.kernel_params", "kernel_params[0]"),
        ("policy.kernel_params", "kernel_params[1]"),
    ]
    allowed = {"kernel_params": ("quiet", "init=*")}
    assert denied(request, **allowed) == []
    assert denied(Later(kernel_params=(Param(key="quiet", value="1"),)), **allowed) != []


def test_every_host_path_of_every_command_is_marked() -> None:
    def paths(model: type[BaseModel]) -> set[str]:
        schema = model.model_json_schema()
        return {
            name
            for part in (schema, *schema.get("$defs", {}).values())
            for name, field in part.get("properties", {}).items()
            if "allowed roots" in str(field)
        }

    assert set().union(*(paths(c.request) for c in COMMANDS.values())) >= {"rootfs", "path"}
    for field in ("rootfs",):
        assert denied(create(container(**{field: "/etc/x"})), host_paths=()) != []


def test_what_a_registry_turned_out_to_have_is_judged_by_its_digest() -> None:
    rules = PolicySettings(images=(ImageRule(repository="team/*", digests=(DIGEST,)),))
    name = "registry.example/team/app"
    assert judge_digest(f"{name}:1", DIGEST, rules) == ()
    assert judge_digest(f"{name}:1", OTHER, rules) != ()
    assert judge_digest(f"{name}@{DIGEST}", OTHER, rules) == ()  # the index, of which OTHER is one platform's
    assert judge_digest("registry.example/x/app:1", DIGEST, rules) != ()


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("busybox", ("docker.io", "library/busybox", None)),
        ("team/app:1", ("docker.io", "team/app", None)),
        ("localhost/app", ("localhost", "app", None)),
        ("host:5000/a/b:tag", ("host:5000", "a/b", None)),
        (f"r.example/a@{DIGEST}", ("r.example", "a", DIGEST)),
    ],
)
def test_references_are_split_as_registries_do(reference: str, parts: tuple[str, str, str | None]) -> None:
    assert split_reference(reference) == parts


def test_the_error_names_the_rule_what_to_change_and_all_denials() -> None:
    found = judge(create(CAPS, container("b")), PolicySettings(capabilities=("CAP_CHOWN",)), NOTHING)
    with pytest.raises(PermissionDeniedError) as caught:
        require(found)
    assert caught.value.message == (
        "pod.containers[0].cmd.capabilities[1]: CAP_SYS_ADMIN, which is not allowed; allowed: CAP_CHOWN "
        "(rule policy.capabilities), and 1 more denials."
    )
    assert [d["field"] for d in caught.value.details["denials"]] == [d.field for d in found]
    require(())


def test_paths_of_the_policy_must_lie_below_the_allowed_roots() -> None:
    with pytest.raises(ValidationError, match="must lie below one of allowed_roots"):
        Settings(allowed_roots=(Path("/srv"),), policy=PolicySettings(host_paths=(Path("/etc"),)))


# ---- where it is asked -------------------------------------------------------------------------------


async def test_a_denied_command_does_nothing_and_is_answered_the_same_again() -> None:
    world = Handlers()
    world.pods.denied = PermissionDeniedError("No.", rule="policy.x", field="pod", denials=[])
    headers = {wire.COMMAND_ID: "c1"}
    first = await world.dispatcher.dispatch("pod.create", headers, b'{"pod": {"id": "p1"}}')
    again = await world.dispatcher.dispatch("pod.create", headers, b'{"pod": {"id": "p1"}}')
    assert (first.code, first.number, first.retryable) == ("permission_denied", 403, False)
    assert (again.body, again.headers[wire.DUPLICATE]) == (first.body, "true")
    assert world.pods.calls == []
    assert (await world.dispatcher.dispatch("pod.list", {}, b"{}")).ok


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[World]:
    rules = PolicySettings(
        max_containers=2,
        images=(ImageRule(repository="team/*", digests=(DIGEST,)),),
        host_paths=("/roots/a",),
    )
    world = await World(tmp_path, policy=rules).start()
    yield world
    await world.close()


async def test_a_pods_containers_count_together(strict: World) -> None:
    root = "/roots/a/x"
    await strict.pods.create(
        pod(containers=[container("a", rootfs=root), container("b", rootfs=root)]), strict.call()
    )
    with pytest.raises(PermissionDeniedError, match=r"policy\.max_containers"):
        strict.pods.permit(ContainerCreate(pod_id="p1", container=container("c", rootfs=root)))
    strict.pods.permit(ContainerCreate(pod_id="p1", container=container("b", rootfs=root)))


async def test_a_pull_is_given_up_when_the_digest_is_another(strict: World) -> None:
    request = ImagePull(reference="registry.example/team/app:1")
    strict.pods.permit(request)
    with pytest.raises(PermissionDeniedError, match=r"policy\.images"):
        await strict.images.pull(request, strict.call())
    assert strict.images.names == set()


async def test_a_node_does_not_bid_for_what_it_would_deny(strict: World) -> None:
    fleet = await fleet_of(strict)
    bid = fleet.bid(ask(pod(containers=[container(rootfs="/roots/b")])))
    assert not bid.able
    assert bid.reasons == (
        "pod.containers[0].rootfs: '/roots/b' lies outside of what is allowed, /roots/a "
        "(rule policy.host_paths).",
    )


async def test_storage_follows_no_link_out_of_what_the_policy_allows(tmp_path: Path) -> None:
    from vcnode.drivers.storage.paths import AllowedRoots

    for name in "ab":
        (tmp_path / name / "root").mkdir(parents=True)
    (tmp_path / "a/link").symlink_to(tmp_path / "b/root")
    settings = Settings(allowed_roots=(tmp_path,), policy=PolicySettings(host_paths=(tmp_path / "a",)))
    roots = AllowedRoots(settings.host_paths, private=())
    roots.check_directory(str(tmp_path / "a/root"))
    with pytest.raises(InvalidArgumentError):
        roots.check_directory(str(tmp_path / "a/link"))


async def test_people_can_ask_beforehand(tmp_path: Path) -> None:
    settings = tmp_path / "node.toml"
    settings.write_text('[policy]\nmax_containers = 0\n[[policy.images]]\nregistry = "registry.example"\n')
    spec = b'{"containers": [{"image": "busybox"}]}'
    asked = await vcnode("policy", "check", "-", "--config", str(settings), stdin=spec)
    assert (asked.code, asked.out.splitlines()) == (
        8,
        [
            "denied by policy.max_containers: pod.containers: 1 is more than a pod may have, 0",
            "denied by policy.images: pod.containers[0].image: 'busybox' fits no rule; there are: "
            "registry.example/*",
        ],
    )
    assert (await vcnode("policy", "check", "-", stdin=spec)).out == "allowed\n"


STRICT = PolicySettings(
    image_import=False,
    guest_exec=False,
    own_guests=False,
    images=(),
    capabilities=(),
    host_paths=(),
    hook_dirs=(),
    hook_env=(),
    kernel_params=(),
    hypervisor_params=(),
    secret_dirs=(),
    max_vcpu_count=1,
    max_mem_size_mib=128,
    max_containers=1,
    max_disk_size_mib=1,
)


def test_nothing_is_missed_for_not_being_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all examples of requests, the fields that can tell nothing have told nothing."""
    requests = [
        PAYLOADS[path.parent.name].model.model_validate_json(path.read_text())
        for path in sorted(Path("contracts/examples/good").glob("*.request/*.json"))
    ]
    judged = [judge(request, STRICT, IMAGES) for request in requests]
    assert len({denial.rule for found in judged for denial in found}) > 8
    monkeypatch.setattr(policy, "_telling", lambda model: tuple(model.model_fields))
    assert judged == [judge(request, STRICT, IMAGES) for request in requests]


class Inner(Request):
    path: HostPath = "/a"


class Outer(Request):
    """What a type can hide a model in."""

    plain: str = ""
    one: Inner | None = None
    several: tuple[Annotated[Inner | str, "x"], ...] = ()
    by_name: Mapping[str, str] = MappingProxyType({})
    anything: Any = None
    more: Outer | None = None
    none_here: Resources | None = None
    nothing: DnsConfig | None = None


def test_what_can_hold_something_is_looked_at() -> None:
    assert policy._telling(Outer) == ("one", "several", "anything", "more", "none_here")
