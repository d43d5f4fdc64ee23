"""vcnode.models.hypervisor: what goes with what."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from vcnode.models.hypervisor import DiskFormat, HypervisorConfig, Param


@pytest.mark.parametrize(
    "fields",
    [
        {"image_format": "raw"},
        {"image_writable": True},
        {"firmware_path": "/fw"},
        {"firmware_path": "/fw", "image_path": "/d", "kernel_path": "/k"},
        {"image_path": "/d", "kernel_params": [{"key": "quiet"}]},
        {"kernel_path": "/k", "kernel_params": [{"key": "a", "value": "b c"}]},
        {"kernel_params": [{"key": "a", "value": 'b"'}]},
        {"kernel_params": [{"key": "-a"}]},
        {"cpu_model": "max -S"},
        {"machine_type": "pc"},
        {"kernel_path": "relative"},
    ],
    ids=str,
)
def test_what_does_not_go_together(fields: dict[str, object]):
    with pytest.raises(ValidationError):
        HypervisorConfig.model_validate_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("/d.qcow2", None, DiskFormat.QCOW2),
        ("/d.img", None, DiskFormat.RAW),
        ("/qcow2", None, DiskFormat.RAW),
        ("/d.qcow2", DiskFormat.RAW, DiskFormat.RAW),
    ],
)
def test_the_format_follows_from_the_name(path: str, given: DiskFormat | None, expected: DiskFormat):
    assert HypervisorConfig(image_path=path, image_format=given).format is expected


def test_who_boots_what():
    plain = HypervisorConfig()
    assert (plain.is_default, plain.own_guest, plain.from_disk) == (True, False, False)
    tuned = HypervisorConfig(debug=True, kernel_params=(Param(key="a", value="1"), Param(key="b")))
    assert (tuned.is_default, tuned.own_guest) == (False, False)
    assert [str(param) for param in tuned.kernel_params] == ["a=1", "b"]
    disk = HypervisorConfig(image_path="/d", firmware_path="/fw")
    assert (disk.own_guest, disk.from_disk, disk.files) == (True, True, {"firmware_path": "/fw"})
    assert not HypervisorConfig(image_path="/d", kernel_path="/k").from_disk
