"""Secrets: opened for the guest alone, and in clear nowhere else."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.cli import vcnode
from tests.unit.pods.test_fleet import ask, fleet_of
from tests.unit.pods.world import World, container, pod
from vcnode.drivers.mock_host import MockHost
from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.drivers.storage.secrets import read_secret
from vcnode.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
    VcnodeError,
)
from vcnode.models.commands import ExecOptions, PodCreate
from vcnode.models.pod import Cmd, ContainerSpec, EnvVar, PodSpec
from vcnode.models.secrets import MAX_SECRET_BYTES, Sealed, SecretFile
from vcnode.models.vm import GuestContainer
from vcnode.models.xkeys import CurveKey
from vcnode.pods import keyring
from vcnode.settings import PolicySettings

MARKER = "MARKER-5f1d"
OWN, FLEET, OTHER = CurveKey.make(), CurveKey.make(), CurveKey.make()


def seal(content: bytes = MARKER.encode(), key: CurveKey = OWN) -> Sealed:
    sender = CurveKey.make()
    box = base64.b64encode(sender.seal(content, key.public)).decode()
    return Sealed(to=key.public, sender=sender.public, data=box)


def with_secrets(*envs: EnvVar, files: tuple[SecretFile, ...] = ()) -> PodSpec:
    return pod(containers=[container(cmd=Cmd(args=("sleep", "infinity"), envs=envs), secrets=files)])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    built = World(tmp_path, policy=PolicySettings(secret_dirs=(Path("/secrets"),)))
    built.keys = (OWN, FLEET)
    await built.start()
    yield built
    await built.close()


def in_guest(world: World) -> GuestContainer:
    *_, guest = world.guests.by_vm_id.values()
    return guest.containers["c1"].spec


async def test_only_the_guest_gets_it_in_clear(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    spec = with_secrets(
        EnvVar(var="PLAIN", value="x"),
        EnvVar(var="A", sealed=seal()),
        EnvVar(var="B", sealed=seal(key=FLEET)),
        EnvVar(var="C", file="/secrets/c"),
        files=(SecretFile(name="f", sealed=seal(b"\x00" + MARKER.encode()), mode=0o400),),
    )
    status = await world.pods.run(spec, world.call("pod.run"))
    given = in_guest(world)
    assert dict(given.process.envs) == {
        "PLAIN": "x", "A": MARKER, "B": MARKER, "C": "secret of /secrets/c"
    }  # fmt: skip
    assert [(s.name, s.mode, s.data) for s in given.secrets] == [("f", 0o400, b"\x00" + MARKER.encode())]
    assert MARKER not in repr(given)

    options = ExecOptions(cmd=Cmd(args=("env",), envs=(EnvVar(var="D", sealed=seal()),)))
    result = await world.pods.exec("p1", "c1", options, world.call("container.exec"))
    # What a container says of it is its own affair.
    assert {f"A={MARKER}", f"D={MARKER}"} <= set(result.stdout.data.splitlines())

    host = MockHost(tmp_path / "host.json")
    host.guests = world.guests
    host.vms = world.vms
    host.save()
    events = [event.model_dump_json() for event in await world.events()]
    assert MARKER not in json.dumps(
        [*events, status.model_dump_json(), caplog.text, *world.host.notes.values()]
    )
    assert '"A","***"' in (tmp_path / "host.json").read_text()
    for file in tmp_path.rglob("*"):  # the database among them, with its write-ahead log
        assert MARKER.encode() not in file.read_bytes(), file


async def test_it_opens_again_after_a_restart(world: World) -> None:
    await world.pods.run(with_secrets(EnvVar(var="A", sealed=seal())), world.call("pod.run"))
    await world.restart()
    await world.pods.recover()
    await world.pods.stop("p1", 0, world.call("pod.stop"))
    await world.pods.start("p1", world.call("pod.start"))
    assert dict(in_guest(world).process.envs) == {"A": MARKER}


def changed(sealed: Sealed) -> Sealed:
    raw = bytearray(base64.b64decode(sealed.data))
    raw[-1] ^= 1
    return sealed.model_copy(update={"data": base64.b64encode(bytes(raw)).decode()})


@pytest.mark.parametrize(
    ("variable", "error", "words"),
    [
        (EnvVar(var="A", sealed=seal(key=OTHER)), InvalidArgumentError, "is sealed for X"),
        (EnvVar(var="A", sealed=changed(seal())), InvalidArgumentError, "does not open"),
        (EnvVar(var="A", sealed=seal(b"\xff")), InvalidArgumentError, "UTF-8"),
        (EnvVar(var="A", sealed=seal(b"a\0b")), InvalidArgumentError, "NUL"),
        (EnvVar(var="A", sealed=seal(bytes(MAX_SECRET_BYTES + 1))), InvalidArgumentError, "more than"),
        (EnvVar(var="A", file="/secrets/missing"), NotFoundError, "does not exist"),
        (EnvVar(var="A", file="/etc/shadow"), InvalidArgumentError, "outside"),
    ],
)
async def test_what_cannot_be_had_is_said_when_the_pod_is_made(
    world: World, variable: EnvVar, error: type[VcnodeError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        await world.pods.create(with_secrets(variable), world.call("pod.create"))
    assert "pod.containers[0].cmd.envs[0]" in caught.value.message
    assert world.store.pods == {}


async def test_files_of_the_host_are_denied_unless_the_policy_has_their_directory(world: World) -> None:
    for spec in (
        with_secrets(EnvVar(var="A", file="/etc/shadow")),
        with_secrets(files=(SecretFile(name="s", file="/secrets/../etc/shadow"),)),
    ):
        with pytest.raises(PermissionDeniedError, match=r"policy\.secret_dirs"):
            world.pods.permit(PodCreate(pod=spec))
    world.pods.permit(PodCreate(pod=with_secrets(EnvVar(var="A", file="/secrets/a"))))


async def test_a_node_without_the_key_does_not_bid(world: World) -> None:
    fleet = await fleet_of(world)
    assert fleet.bid(ask(with_secrets(EnvVar(var="A", sealed=seal(key=FLEET))))).able
    bid = fleet.bid(ask(with_secrets(EnvVar(var="A", sealed=seal(key=OTHER)))))
    assert bid.reasons == (f"A secret is sealed for {OTHER.public}.",)


@pytest.mark.parametrize(
    "fields",
    [
        {"cmd": {"args": ["a"], "envs": [{"var": "A"}]}},
        {"cmd": {"args": ["a"], "envs": [{"var": "A", "value": "x", "file": "/f"}]}},
        {"secrets": [{"name": "a"}]},
        {"secrets": [{"name": "a", "file": "/f"}, {"name": "a", "file": "/g"}]},
        {"secrets": [{"name": "../a", "file": "/f"}]},
        {"secrets": [{"name": "a", "file": "/f", "mode": 0o4755}]},
    ],
)
def test_a_secret_is_given_in_exactly_one_way_and_has_a_plain_name(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"exactly one|distinct|pattern|less than"):
        ContainerSpec.model_validate_json(json.dumps({"rootfs": "/r", "cmd": {"args": ["a"]}, **fields}))


# ---- files -------------------------------------------------------------------------------------------


def test_the_nodes_key_stays_and_is_its_own(tmp_path: Path) -> None:
    shared = tmp_path / "fleet"
    keyring.write(shared, FLEET)
    (tmp_path / "xkey.new").write_text("half of an earlier one")
    first = keyring.load(tmp_path, [shared])
    again = keyring.load(tmp_path, [shared])
    assert [key.public for key in first] == [key.public for key in again]
    assert first[1].public == FLEET.public
    assert (tmp_path / "xkey").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [("SX", 0o600, "no seed"), (OWN.seed, 0o640, "chmod 600"), (None, 0, "cannot be read")],
    ids=["no-seed", "open-to-others", "absent"],
)
def test_a_key_that_cannot_be_used_stops_the_node(
    tmp_path: Path, text: str | None, mode: int, words: str
) -> None:
    file = tmp_path / "fleet"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(StorageError, match=words) as caught:
        keyring.load(tmp_path, [file])
    assert OWN.seed not in caught.value.message


def test_files_are_read_below_their_directories_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "secrets", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("not this")
    (inside / "a").write_bytes(b"\x00value\n")
    (inside / "link").symlink_to(outside)
    (inside / "long").write_bytes(bytes(MAX_SECRET_BYTES + 1))
    roots = AllowedRoots([inside], private=())
    assert read_secret(roots, str(inside / "a")) == b"\x00value\n"
    for bad in (inside / "link", inside / "long", inside, outside):
        with pytest.raises(InvalidArgumentError):
            read_secret(roots, str(bad))


async def test_people_can_make_keys_and_seal(tmp_path: Path) -> None:
    file = tmp_path / "fleet"
    made = await vcnode("secret", "key", str(file))
    assert (made.code, file.stat().st_mode & 0o777) == (0, 0o600)
    public = made.out.strip()
    assert (await vcnode("secret", "key", str(file))).code == 1
    sealed = await vcnode("secret", "seal", "--key", public, stdin=MARKER.encode())
    box = Sealed.model_validate(sealed.json["sealed"])
    key = CurveKey.from_seed(file.read_text().strip())
    assert key.open(base64.b64decode(box.data), box.sender) == MARKER.encode()
    assert (await vcnode("secret", "seal", "--key", "XX", stdin=b"a")).code == 2
