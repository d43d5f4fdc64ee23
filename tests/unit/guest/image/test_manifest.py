from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vcnode.guest.image import manifest
from vcnode.guest.image.errors import GuestImageError

CONTENTS = {manifest.KERNEL: b"kernel", manifest.INITRD: b"initrd"}


def _facts() -> dict[str, Any]:
    return {
        "format": manifest.FORMAT,
        "inputs_digest": "in",
        "agent_version": "1",
        "agent_digest": "agent",
        "builder_version": "1+x",
        "kernel_release": "6.1",
        "python_version": "3.11",
        "packages": [{"name": "libc6", "version": "2", "architecture": "amd64", "sha256": "x"}],
        "files": {name: manifest.file_facts(content) for name, content in CONTENTS.items()},
    }


def _write(
    directory: Path, facts: dict[str, Any] | None = None, time: str = "2026-01-01T00:00:00+00:00"
) -> Path:
    for name, content in CONTENTS.items():
        (directory / name).write_bytes(content)
    (directory / manifest.MANIFEST).write_bytes(manifest.seal(_facts() if facts is None else facts, time))
    return directory


def test_what_was_sealed_is_loaded(tmp_path: Path) -> None:
    image = manifest.load(_write(tmp_path))
    assert image.directory == tmp_path
    assert image.kernel.read_bytes() == b"kernel"
    assert image.initrd.read_bytes() == b"initrd"
    assert (image.kernel_release, image.python_version, image.packages) == ("6.1", "3.11", {"libc6": "2"})


def test_the_time_is_outside_the_digest_and_everything_else_inside(tmp_path: Path) -> None:
    first = manifest.load(_write(tmp_path))
    assert manifest.load(_write(tmp_path, time="2030-01-01T00:00:00+00:00")).digest == first.digest
    assert manifest.load(_write(tmp_path, _facts() | {"kernel_release": "6.2"})).digest != first.digest


def test_a_missing_image_says_how_to_make_one(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent", _write(tmp_path) / manifest.KERNEL):
        (tmp_path / manifest.MANIFEST).unlink(missing_ok=True)
        with pytest.raises(GuestImageError, match=r"no guest image.*vcnode guest build"):
            manifest.load(directory)


def _remove_initrd(directory: Path) -> None:
    (directory / manifest.INITRD).unlink()


def _change_kernel(directory: Path) -> None:
    (directory / manifest.KERNEL).write_bytes(b"Kernel")


def _truncate_initrd(directory: Path) -> None:
    (directory / manifest.INITRD).write_bytes(b"init")


def _cut_manifest(directory: Path) -> None:
    path = directory / manifest.MANIFEST
    path.write_bytes(path.read_bytes()[:100])


def _edit_manifest(directory: Path) -> None:
    path = directory / manifest.MANIFEST
    path.write_text(path.read_text().replace('"6.1"', '"6.6"'))


def _newer_format(directory: Path) -> None:
    _write(directory, _facts() | {"format": manifest.FORMAT + 1})


def _not_an_object(directory: Path) -> None:
    (directory / manifest.MANIFEST).write_text("[]")


def _not_text(directory: Path) -> None:
    (directory / manifest.MANIFEST).write_bytes(b"\xff\xfe\x00")


def _lacking(directory: Path) -> None:
    _write(directory, {key: value for key, value in _facts().items() if key != "packages"})


def _wrong_types(directory: Path) -> None:
    _write(directory, _facts() | {"files": ["vmlinux"]})


@pytest.mark.parametrize(
    "damage",
    [
        _remove_initrd, _change_kernel, _truncate_initrd, _cut_manifest, _edit_manifest, _newer_format,
        _not_an_object, _not_text, _lacking, _wrong_types,
    ],
)  # fmt: skip
def test_damage_is_noticed_and_says_what_to_do(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(_write(tmp_path))
    with pytest.raises(GuestImageError, match="vcnode guest build"):
        manifest.load(tmp_path)


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert manifest.digest_of({"a": 1, "b": 2}) == manifest.digest_of(json.loads('{"b": 2, "a": 1}'))
