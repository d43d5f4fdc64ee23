"""What QEMU's words mean. They are those that QEMU 7.2 has printed."""

from __future__ import annotations

import pytest

from vcnode.drivers.hypervisor.qemu import words
from vcnode.errors import (
    FailedPreconditionError,
    HypervisorError,
    InvalidArgumentError,
    ResourceExhaustedError,
    VcnodeError,
)

LOCKED = """qemu-system-x86_64: -drive file=t.img,format=raw,if=virtio: Failed to get "write" lock
Is another process using the image [t.img]?
"""


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            "qemu-system-x86_64: unable to find CPU model 'nosuch'\n",
            InvalidArgumentError,
            "cpu_model: .*'nosuch'",
        ),
        (LOCKED, FailedPreconditionError, "in use by another VM"),
        (
            "qemu-system-x86_64: cannot set up guest memory 'ram': Cannot allocate memory\n",
            ResourceExhaustedError,
            "memory",
        ),
        ("", HypervisorError, "code 1 before"),
        ("qemu-system-x86_64: unable to find something else\n", HypervisorError, "code 1 before"),
    ],
)
def test_last_words(said: str, kind: type[VcnodeError], message: str) -> None:
    error = words.ended("vm-1", said, 1)
    assert type(error) is kind
    with pytest.raises(kind, match=message):
        raise error


def test_a_lock_is_told_from_other_refusals() -> None:
    assert words.is_locked('Failed to get shared "consistent read" lock')
    assert not words.is_locked("Could not open '/dev/fdset/1': Permission denied")
