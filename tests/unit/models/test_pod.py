import pytest
from pydantic import ValidationError

from vcnode.models.pod import (
    MAX_CONTAINERS,
    MAX_MEM_SIZE_MIB,
    MAX_VCPU_COUNT,
    MIN_MEM_SIZE_MIB,
    Cmd,
    ContainerResources,
    ContainerSpec,
    EnvVar,
    PodSpec,
    Resources,
    Rlimit,
)


def locations(model, value) -> list[str]:
    """Where *value* is wrong; empty when it is not. As JSON, which is how requests arrive."""
    import json

    try:
        model.model_validate_json(json.dumps(value))
    except ValidationError as exc:
        return sorted(".".join(map(str, error["loc"])) for error in exc.errors())
    return []


def container(**fields):
    return {"image": "busybox", **fields}


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, []),
        ({"vcpu_count": 0}, ["vcpu_count"]),
        ({"vcpu_count": MAX_VCPU_COUNT}, []),
        ({"vcpu_count": MAX_VCPU_COUNT + 1}, ["vcpu_count"]),
        ({"mem_size_mib": MIN_MEM_SIZE_MIB}, []),
        ({"mem_size_mib": MIN_MEM_SIZE_MIB - 1}, ["mem_size_mib"]),
        ({"mem_size_mib": MAX_MEM_SIZE_MIB + 1}, ["mem_size_mib"]),
        ({"mem_size_mib": "256"}, ["mem_size_mib"]),
        ({"mem_size_mib": 256.5}, ["mem_size_mib"]),
        ({"memory": 1}, ["memory"]),
    ],
)
def test_resources_have_bounds(fields, wrong):
    assert locations(Resources, fields) == wrong


@pytest.mark.parametrize(
    ("fields", "good"),
    [
        ({"image": "busybox"}, True),
        ({"rootfs": "/srv/a", "cmd": {"args": ["/bin/sh"]}}, True),
        ({}, False),
        ({"image": "busybox", "rootfs": "/srv/a", "cmd": {"args": ["x"]}}, False),
        ({"rootfs": "/srv/a"}, False),
    ],
    ids=["image", "rootfs", "neither", "both", "rootfs without a command"],
)
def test_container_has_one_root_and_a_command(fields, good):
    assert (locations(ContainerSpec, fields) == []) is good


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"args": ["a\0b"]}, ["args.0"]),
        ({"workdir": "relative"}, ["workdir"]),
        ({"user": "a\0"}, ["user"]),
        ({"envs": [{"var": "A=B", "value": ""}]}, ["envs.0.var"]),
        ({"envs": [{"var": "", "value": ""}]}, ["envs.0.var"]),
        ({"envs": [{"var": "A", "value": "\0"}]}, ["envs.0.value"]),
        ({"envs": [{"var": "A", "value": "=anything\n"}]}, []),
        ({"capabilities": ["net_admin"]}, ["capabilities.0"]),
        ({"capabilities": []}, []),
        ({"rlimits": [{"type": "nofile", "soft": -2, "hard": 1}]}, ["rlimits.0.soft"]),
        ({"args": "sh"}, ["args"]),
    ],
)
def test_commands_are_checked_to_the_last_field(fields, wrong):
    assert locations(Cmd, fields) == wrong


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"cpu_quota_us": 999}, ["cpu_quota_us"]),
        ({"cpu_period_us": 2_000_000}, ["cpu_period_us"]),
        ({"cpu_shares": 1}, ["cpu_shares"]),
        ({"mem_limit_mib": 3}, ["mem_limit_mib"]),
        ({"pids_limit": 0}, ["pids_limit"]),
    ],
)
def test_container_limits_have_bounds(fields, wrong):
    assert locations(ContainerResources, fields) == wrong


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, []),
        ({"id": "p1", "hostname": "Box-1"}, []),
        ({"id": "p.1"}, ["id"]),
        ({"hostname": "under_score"}, ["hostname"]),
        ({"hostname": "-x"}, ["hostname"]),
        ({"hypervisor_type": "xen"}, ["hypervisor_type"]),
        ({"containers": [container(id="c"), {"id": "d"}]}, ["containers.1"]),
        ({"containers": [container()] * MAX_CONTAINERS}, []),
        ({"containers": [container()] * (MAX_CONTAINERS + 1)}, ["containers"]),
        ({"nested": {}}, ["nested"]),
    ],
)
def test_pods_name_the_field_that_is_wrong(fields, wrong):
    assert locations(PodSpec, fields) == wrong


def test_container_ids_of_a_pod_are_distinct():
    twice = {"containers": [container(id="c"), container(id="d"), container(id="c")]}
    with pytest.raises(ValidationError, match=r"c is used more than once"):
        PodSpec.model_validate(twice, strict=False)
    assert locations(PodSpec, {"containers": [container(), container()]}) == []


def test_specs_survive_their_own_json():
    spec = PodSpec(
        id="p",
        containers=(
            ContainerSpec(
                image="busybox",
                cmd=Cmd(
                    args=("a",),
                    envs=(EnvVar(var="A", value="b"),),
                    rlimits=(Rlimit(type="nofile", soft=1, hard=2),),
                ),
            ),
        ),
    )
    assert PodSpec.model_validate_json(spec.model_dump_json()) == spec
