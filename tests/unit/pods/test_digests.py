"""Files of guests are held against their digests before they are used."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.errors import FailedPreconditionError
from vcnode.models.pod import HypervisorConfig, PodState
from vcnode.pods.digests import verify


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_file_is_what_its_digest_says_or_refused(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"k" * 3_000_000)
    wanted = f"{algorithm}:{hashlib.new(algorithm, path.read_bytes()).hexdigest()}"
    fd = os.open(path, os.O_RDONLY)
    try:
        verify(fd, wanted, "kernel")
        verify(fd, wanted, "kernel")
        assert os.read(fd, 1) == b"k"
        with path.open("r+b") as file:
            file.write(b"x")
        with pytest.raises(FailedPreconditionError, match=f"kernel: .*it has {algorithm}:"):
            verify(fd, wanted, "kernel")
    finally:
        os.close(fd)


async def test_a_wrong_digest_stops_the_start(world: World) -> None:
    """What the mock storage opens is empty."""
    empty = f"sha256:{hashlib.sha256().hexdigest()}"
    config = HypervisorConfig(kernel_path="/roots/k", kernel_digest=empty)
    await world.pods.run(pod(hypervisor_config=config), world.call())
    wrong = config.model_copy(update={"kernel_digest": "sha256:" + "0" * 64})
    await world.pods.create(pod("p2", hypervisor_config=wrong), world.call())
    with pytest.raises(FailedPreconditionError, match="kernel_path: the file does not have this digest"):
        await world.pods.start("p2", world.call())
    assert world.pods.status("p2").state is PodState.FAILED
    assert len(world.vms.alive) == 1


def test_a_digest_goes_with_a_file() -> None:
    with pytest.raises(ValueError, match="initrd_path"):
        HypervisorConfig(initrd_digest="sha256:" + "0" * 64)
    with pytest.raises(ValueError, match="pattern"):
        HypervisorConfig(initrd_path="/roots/i", initrd_digest="md5:0")
