"""vcnode.drivers.storage.qcow2, against images that qemu-img makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vcnode.drivers.storage import qcow2
from vcnode.errors import InvalidArgumentError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img: install qemu-utils")


def made(directory: Path, *options: str, size: str = "3G") -> bytes:
    path = directory / "disk.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size]
    subprocess.run(command, check=True, timeout=30, cwd=directory)
    return path.read_bytes()[: qcow2.HEADER_BYTES]


@pytest.mark.parametrize("options", [(), ("-o", "compat=0.10"), ("-o", "cluster_size=2M")], ids=str)
def test_the_size_of_a_disk(tmp_path: Path, options: tuple[str, ...]):
    assert qcow2.size_bytes(made(tmp_path, *options), "/d") == 3 << 30


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("-b", "/etc/shadow", "-F", "raw", "-u"), "based on another image"),
        (("-o", "data_file=other,data_file_raw=on"), "data in another file"),
    ],
    ids=["backing file", "external data"],
)
def test_images_that_name_other_files_are_refused(tmp_path: Path, options: tuple[str, ...], match: str):
    with pytest.raises(InvalidArgumentError, match=match):
        qcow2.size_bytes(made(tmp_path, *options), "/d")


def test_what_is_no_image_for_us(tmp_path: Path):
    header = bytearray(made(tmp_path))
    encrypted, future = bytearray(header), bytearray(header)
    encrypted[35] = 1  # the last byte of crypt_method
    future[7] = 4
    for data, match in (
        (b"", "no qcow2"),
        (bytes(104), "no qcow2"),
        (bytes(header[:50]), "no qcow2"),
        (bytes(encrypted), "encrypted"),
        (bytes(future), "version 4"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            qcow2.size_bytes(data, "/d")
