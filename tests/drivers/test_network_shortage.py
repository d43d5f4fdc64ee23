"""What a host runs out of: each is told as what it is, with what to do, and what was begun can be undone."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from tests.drivers.test_bridge import LIMIT_S, Host, bridging, sh
from tests.support import networks
from tests.support.netns import private_network
from vcnode.drivers import namespaces
from vcnode.drivers.network import interworking, links, taps
from vcnode.drivers.network.cni import plugins
from vcnode.errors import NetworkError, ResourceExhaustedError
from vcnode.models.network import Interworking, PortMapping

pytestmark = pytest.mark.root


@contextlib.contextmanager
def only(count: int) -> Iterator[None]:
    """Leave this process so many file descriptors."""
    # What lists them takes one as well, which is gone by the time of the second look.
    used = {int(name) for name in os.listdir("/proc/self/fd") if Path("/proc/self/fd", name).is_symlink()}
    limit = next(n for n in range(count + 1, 4096) if n - len({fd for fd in used if fd < n}) == count)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with bridging() as made:
        yield made


# asyncio leaves a loop to the garbage collector for which there were no descriptors.
@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_with_too_few_descriptors_a_pod_is_refused_at_any_step_and_undone(host: Host):
    await host.pod()  # from now on the table is there
    for count in range(1, 40):
        planned = host.plan(ports=(PortMapping(host=8080, container=80),))
        refused = None
        try:
            with only(count):
                attached = await host.network.attach(planned, timeout_s=LIMIT_S)
        except ResourceExhaustedError as exc:
            refused = exc.message
        finally:
            await host.network.detach(planned, timeout_s=LIMIT_S)
        if refused is None:
            break
        assert "descriptors" in refused, count
        assert {h.vm_id for h in await host.network.held(host.mark)} <= {None, host.held[0].vm_id}
    else:
        pytest.fail("there were never enough")
    assert count > 5
    assert attached.endpoints == planned.endpoints


async def test_taps_without_a_descriptor_are_told_and_none_stays_open(host: Host):
    pod = await host.pod(networks=("a", "b", "c"))
    host.close_taps()
    before = len(os.listdir("/proc/self/fd"))
    for count in range(1, 3):
        with only(count), pytest.raises(ResourceExhaustedError, match="descriptors"):
            await host.network.open_taps(pod.attachment)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_plugins_without_a_descriptor_are_told(tmp_path: Path):
    program = tmp_path / "plugin"
    program.write_text("#!/bin/sh\ntrue\n")
    program.chmod(0o755)
    for count in range(1, 5):
        with only(count), pytest.raises(ResourceExhaustedError, match="descriptors"):
            await plugins.run(program, {}, b"{}", timeout_s=LIMIT_S)
    assert (await plugins.run(program, {}, b"{}", timeout_s=LIMIT_S)).returncode == 0


async def test_taps_and_names_that_are_taken_are_told():
    name = f"taken-{secrets.token_hex(4)}"
    with private_network(), networks.named(name) as path:
        networks.run("ip", "link", "add", "eth0", "type", "veth", "peer", "far0", netns=path)
        networks.run("ip", "link", "add", "tap0", "type", "bridge", netns=path)
        for mode in (Interworking.TC, Interworking.BRIDGED, Interworking.MACVTAP):
            with pytest.raises(NetworkError, match=r"tap0"):
                await interworking.connect(path, "eth0", mode, pair_id="x")
        assert "tap0" in networks.links(path)  # it is somebody else's, and stays
        networks.run("ip", "link", "set", "tap0", "name", "mine", netns=path)

        def twice() -> None:
            taps.make("tap0")
            fd = taps.open_for_qemu("tap0")
            try:
                with pytest.raises(NetworkError, match="another process has it"):
                    taps.open_for_qemu("tap0")
                with pytest.raises(NetworkError, match="of another kind has that name"):
                    taps.make("mine")
            finally:
                os.close(fd)

        namespaces.call(path, twice)


NAMESPACES_USED_UP = """
import pathlib, sys
from vcnode.drivers import namespaces
from vcnode.errors import ResourceExhaustedError
namespaces.DIRECTORY = pathlib.Path(sys.argv[1])
pathlib.Path("/proc/sys/user/max_net_namespaces").write_text("0")
try:
    namespaces.call(None, lambda: namespaces.create("vm-x", lambda: None))
except ResourceExhaustedError as exc:
    assert "user.max_net_namespaces" in exc.message, exc.message
    assert not list(namespaces.DIRECTORY.iterdir())
    print("told")
"""


def test_the_hosts_limit_of_namespaces_is_told(tmp_path: Path):
    inside = ["unshare", "--user", "--map-root-user", "--mount"]  # with limits of its own
    told = sh(*inside, sys.executable, "-c", NAMESPACES_USED_UP, str(tmp_path))
    assert told == "told\n"


def test_the_kernels_words_about_a_shortage_are_ours():
    for number, words in (
        (errno.ENFILE, "descriptors"),
        (errno.ENOMEM, "memory"),
        (errno.ENOBUFS, "memory"),
        (errno.EXFULL, "1,023.*named networks"),  # a bridge's ports, BR_MAX_PORTS; seen with Linux 6
    ):
        with pytest.raises(ResourceExhaustedError, match=words), links.doing("make something"):
            raise NetlinkError(number)
