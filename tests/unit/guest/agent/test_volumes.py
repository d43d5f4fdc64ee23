"""vcnode.guest.agent.volumes: what ``mounts`` of ``create_container`` may say."""

from __future__ import annotations

from typing import Any

import pytest

from vcnode.guest.agent import syscalls, volumes
from vcnode.guest.agent.failures import Failure
from vcnode.guest.agent.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY


def parse(**fields: Any) -> volumes.Mount:
    return volumes.parse({"destination": "/d", **fields}, "mounts[0]")


def test_flags_begin_with_what_is_safe_and_later_options_win() -> None:
    assert parse(shared_name="v").flags == MS_NODEV
    assert parse().flags == MS_NODEV | MS_NOSUID
    given = parse(shared_name="v", options=["ro", "noexec", "dev", "rw", "noatime"])
    assert given.flags == MS_NOEXEC | syscalls.MS_NOATIME
    assert parse(disk_id="v-1", fs="ext4", options=["ro"]).flags == MS_NODEV | MS_RDONLY


def test_a_tmpfs_has_options_of_its_own() -> None:
    mount = parse(options=["size=1m", "noexec", "mode=0700"])
    assert mount.data == "size=1m,mode=0700"
    assert mount.flags == MS_NODEV | MS_NOSUID | MS_NOEXEC


def test_whether_a_disk_is_writable_is_not_up_to_one_mount() -> None:
    assert parse(disk_id="v-1", fs="ext4", options=["ro"]).writable
    assert not parse(disk_id="v-1", fs="erofs", read_only=True).writable


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"destination": "d"}, "mounts[0].destination: must be absolute"),
        ({"shared_name": "../v"}, "mounts[0].shared_name: must be a name"),
        ({"shared_name": ".."}, "mounts[0].shared_name: must be a name"),
        ({"disk_id": "v-1"}, "mounts[0].fs: is missing"),
        ({"disk_id": "v-1", "fs": "ntfs"}, "mounts[0].fs: must be one of"),
        ({"shared_name": "v", "port": "p"}, "mounts[0].port: does not go with shared_name"),
        ({"shared_name": "v", "options": ["size=1m"]}, "mounts[0].options: cannot have"),
        ({"options": [1]}, "mounts[0].options[0]: must be of type str"),
        ({"more": 1}, "mounts[0].more: is not known"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Failure) as caught:
        parse(**fields)
    assert caught.value.message.startswith(words)
    with pytest.raises(Failure, match="type dict"):
        volumes.parse([], "mounts[0]")
