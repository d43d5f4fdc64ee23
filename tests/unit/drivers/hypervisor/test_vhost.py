import contextlib
import os

from vcnode.drivers.hypervisor.qemu import vhost


def test_a_device_that_is_not_there_or_does_not_answer_is_not_used(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as ours:
        assert vhost.open_for(2, ours, device=str(tmp_path / "absent")) == ()
        assert vhost.open_for(2, ours, device=os.devnull) == ()
        assert vhost.open_for(0, ours) == ()
    assert set(os.listdir("/proc/self/fd")) == before
