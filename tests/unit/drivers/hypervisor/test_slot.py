"""What is behind the disk that a template's guest has met."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.drivers.hypervisor.test_argv import SPEC
from vcnode.drivers.hypervisor.qemu import slot
from vcnode.errors import HypervisorError, ResourceExhaustedError
from vcnode.models.vm import SLOT_BYTES, SlotImage, VmSpec


def spec(image: Path | None, **fields: str) -> VmSpec:
    held = None if image is None else SlotImage(digest="sha256:0", path=str(image))
    return SPEC.model_copy(update={"slot": held, **fields})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"an image" * 1000)
    return path


def test_a_clone_has_the_file_itself_and_a_template_a_large_copy(image: Path) -> None:
    with ExitStack() as ours:
        fd = slot.open_for(spec(image, clone_of="k"), ours)
        assert fd is not None
        assert os.path.samestat(os.fstat(fd), image.stat())
        grown = slot.open_for(spec(image, template_key="k"), ours)
        assert grown is not None
        assert os.fstat(grown).st_size == SLOT_BYTES
        assert os.pread(grown, 8100, 0) == image.read_bytes() + bytes(100)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(grown, b"no")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(grown)


def test_there_is_none_where_it_cannot_be_used(image: Path) -> None:
    with ExitStack() as ours:
        assert slot.open_for(spec(image), ours) is None
        assert slot.open_for(spec(None, clone_of="k"), ours) is None
        with pytest.raises(HypervisorError, match="cannot be opened: No such file"):
            slot.open_for(spec(image.with_name("no"), clone_of="k"), ours)


def test_want_of_descriptors_is_not_taken_for_a_broken_template(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(slot.os, "open", refuse)
    with ExitStack() as ours, pytest.raises(ResourceExhaustedError, match="descriptors"):
        slot.open_for(spec(image, clone_of="k"), ours)
