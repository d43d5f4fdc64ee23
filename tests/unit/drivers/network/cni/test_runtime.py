"""A CNI runtime over plugins that hang, fail, or talk nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cni import RESULT, Plugins, failure
from vcnode.drivers.network.cni import config
from vcnode.drivers.network.cni.runtime import Attachment, Runtime
from vcnode.errors import NetworkError

LIMIT_S = 20.0
RUNTIME = {"portMappings": [{"hostPort": 8080}], "bandwidth": {"ingressRate": 1}}


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    made = Plugins(tmp_path / "bin")
    made.write("one", add="""echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/8"}]}'""")
    made.write("two")
    return made


@pytest.fixture
def runtime(plugins: Plugins) -> Runtime:
    return Runtime((plugins.directory / "missing", plugins.directory), timeout_s=10)


def network(*types: str, **fields: Any) -> config.Network:
    confs = [
        {"type": kind, "capabilities": {"portMappings": kind == "two"}} for kind in types or ("one", "two")
    ]
    return config.from_json({"name": "net", "cniVersion": "1.0.0", "plugins": confs} | fields)


def attachment(of: config.Network | None = None, version: str = "1.0.0", **changes: Any) -> Attachment:
    return Attachment(
        container_id="vm-1",
        if_name="eth0",
        netns_path="/run/netns/vm-1",
        args=(("IgnoreUnknown", "1"), ("POD", "web")),
        network=(of or network()).dump(),
        version=version,
        runtime=RUNTIME,
    ).model_copy(update=changes)


async def test_add_calls_in_order_with_the_result_before(plugins: Plugins, runtime: Runtime) -> None:
    raw, result = await runtime.add(attachment())
    assert raw == RESULT
    assert result.version == "1.0.0"
    one, two = plugins.calls()
    assert (one.command, one.plugin, two.plugin) == ("ADD", "one", "two")
    assert one.env == two.env
    assert one.env == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "vm-1",
        "CNI_NETNS": "/run/netns/vm-1",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "IgnoreUnknown=1;POD=web",
        "CNI_PATH": f"{plugins.directory}/missing:{plugins.directory}",
        "PATH": one.env["PATH"],
    }
    assert one.conf == {
        "type": "one",
        "name": "net",
        "cniVersion": "1.0.0",
        "capabilities": {"portMappings": False},
    }
    assert two.conf["prevResult"]["ips"] == [{"address": "10.0.0.2/8"}]
    assert two.conf["runtimeConfig"] == {"portMappings": [{"hostPort": 8080}]}


async def test_delete_calls_in_reverse_with_the_kept_result(plugins: Plugins, runtime: Runtime) -> None:
    await runtime.delete(attachment(result=RESULT), netns_exists=False)
    two, one = plugins.calls()
    assert (two.plugin, one.plugin) == ("two", "one")
    assert one.conf["prevResult"] == two.conf["prevResult"] == RESULT
    assert one.env["CNI_NETNS"] == ""
    assert "runtimeConfig" in two.conf


@pytest.mark.parametrize(("version", "given"), [("0.3.1", False), ("0.4.0", True)])
async def test_old_plugins_get_no_result_to_delete(
    version: str, given: bool, plugins: Plugins, runtime: Runtime
) -> None:
    of = network(cniVersion=version)
    await runtime.delete(attachment(of, version, result=RESULT), netns_exists=True)
    assert [("prevResult" in call.conf) for call in plugins.calls()] == [given, given]
    assert plugins.calls()[0].env["CNI_NETNS"] == "/run/netns/vm-1"


async def test_check_needs_the_result(plugins: Plugins, runtime: Runtime) -> None:
    with pytest.raises(NetworkError, match="was not added"):
        await runtime.check(attachment())
    await runtime.check(attachment(result=RESULT))
    assert plugins.names() == ["CHECK one", "CHECK two"]
    assert plugins.calls()[0].conf["prevResult"] == RESULT


async def test_check_is_not_called_where_it_must_not(plugins: Plugins, runtime: Runtime) -> None:
    await runtime.check(attachment(network(cniVersion="0.3.1"), "0.3.1", result=RESULT))
    await runtime.check(attachment(network(disableCheck=True), result=RESULT))
    assert plugins.names() == []


async def test_status_and_gc_are_of_1_1_only(plugins: Plugins, runtime: Runtime) -> None:
    await runtime.status(network(), "1.0.0")
    await runtime.collect(network(), "1.0.0", ())
    await runtime.collect(network(cniVersion="1.1.0", disableGC=True), "1.1.0", ())
    assert plugins.names() == []
    await runtime.status(network(cniVersion="1.1.0"), "1.1.0")
    assert {key for key in plugins.calls()[0].env if key != "PATH"} == {"CNI_COMMAND", "CNI_PATH"}
    await runtime.collect(network(cniVersion="1.1.0"), "1.1.0", [attachment()])
    assert plugins.names() == ["STATUS one", "STATUS two", "GC one", "GC two"]
    valid = [{"containerID": "vm-1", "ifname": "eth0"}]
    assert plugins.calls()[3].conf["cni.dev/valid-attachments"] == valid


async def test_gc_goes_on_after_a_failure(plugins: Plugins, runtime: Runtime) -> None:
    plugins.write("one", gc=failure(100, "no"))
    with pytest.raises(NetworkError, match="GC of CNI network net: plugin one failed: no"):
        await runtime.collect(network(cniVersion="1.1.0"), "1.1.0", ())
    assert plugins.names() == ["GC one", "GC two"]


async def test_versions_are_asked_for_once_per_program(plugins: Plugins, runtime: Runtime) -> None:
    plugins.write("two", versions=("0.4.0", "1.0.0"))
    assert await runtime.agree(network(cniVersions=["1.1.0", "0.4.0"])) == "1.0.0"
    assert await runtime.agree(network()) == "1.0.0"
    assert len(plugins.calls(versions=True)) == 2
    plugins.write("three", versions=("0.2.0",))
    with pytest.raises(NetworkError, match=r"three speaks 0\.2\.0"):
        await runtime.agree(network("one", "three"))


@pytest.mark.parametrize("version", ["echo hello", "exit 1", "echo '{}'"])
async def test_program_that_is_no_plugin(version: str, plugins: Plugins, runtime: Runtime) -> None:
    plugins.write("odd", version=version)
    with pytest.raises(NetworkError, match="CNI plugin odd of network net"):
        await runtime.agree(network("odd"))


async def test_failure_is_told_with_plugin_command_and_message(plugins: Plugins, runtime: Runtime) -> None:
    plugins.write("two", add=failure(11, "no address is left", "range full"))
    with pytest.raises(NetworkError) as caught:
        await runtime.add(attachment())
    assert (
        caught.value.message == "ADD of CNI network net: plugin two failed: no address is left; range full."
    )
    assert caught.value.details == {"network": "net", "plugin": "two", "command": "ADD", "code": 11}


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ("exit 0", "no result: not JSON"),
        ("echo nonsense", r"no result: not JSON \(nonsense\)"),
        ("echo '[1]'", "no result: not a JSON object"),
        ("""echo '{"cniVersion":"1.0.0","ips":[{"address":"x"}]}'""", r"no result: ips\.0\.address"),
        ("echo oops >&2; exit 3", r"exit code 3 and no error message \(oops\)"),
        ("echo nonsense; exit 1", r"exit code 1 and no error message \(nonsense\)"),
        ("kill -9 $$", "signal 9"),
        ("yes", "wrote more than 1048576 bytes"),
        ("yes >&2", "wrote more than 1048576 bytes"),
    ],
)
async def test_nonsense_is_an_error(add: str, message: str, plugins: Plugins, runtime: Runtime) -> None:
    plugins.write("one", add=add)
    with pytest.raises(NetworkError, match=message) as caught:
        await runtime.add(attachment())
    assert (caught.value.details["plugin"], caught.value.details["command"]) == ("one", "ADD")
    assert plugins.names() == ["ADD one"]


async def test_missing_plugin_is_told_with_a_cure(plugins: Plugins, runtime: Runtime) -> None:
    (plugins.directory / "four").write_text("not executable")
    for name in ("three", "four"):
        with pytest.raises(NetworkError, match=f"plugin {name} is not installed in .*set cni.bin_dirs"):
            await runtime.add(attachment(network(name)))


async def test_program_that_cannot_be_executed(plugins: Plugins, runtime: Runtime) -> None:
    program = plugins.directory / "five"
    program.write_text("#!/nowhere\n")
    program.chmod(0o755)
    with pytest.raises(NetworkError, match="five cannot be executed: No such file"):
        await runtime.add(attachment(network("five")))


async def test_plugin_that_hangs_is_killed_with_its_children(plugins: Plugins, tmp_path: Path) -> None:
    runtime = Runtime((plugins.directory,), timeout_s=1.0)
    plugins.write("one", add=f"sleep 1000 & echo $! >{tmp_path}/child; sleep 1000")
    with pytest.raises(NetworkError, match=r"one has not ended within 1 s and was killed"):
        await runtime.add(attachment())
    await gone(int((tmp_path / "child").read_text()))


async def test_cancelled_call_leaves_no_process(plugins: Plugins, runtime: Runtime, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "up")
    plugins.write("one", add=f"echo $$ >{tmp_path}/up; exec sleep 1000")
    call = asyncio.create_task(runtime.add(attachment()))
    pid = int(await asyncio.to_thread((tmp_path / "up").read_text))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await gone(pid)


async def test_process_that_a_plugin_leaves_holds_nobody_up(
    plugins: Plugins, runtime: Runtime, tmp_path: Path
) -> None:
    plugins.write("two", add=f'sleep 1000 & echo $! >{tmp_path}/child; echo \'{{"cniVersion":"1.0.0"}}\'')
    began = time.monotonic()
    await runtime.add(attachment())
    assert time.monotonic() - began < 5
    await gone(int((tmp_path / "child").read_text()))


async def gone(pid: int) -> None:
    """Wait until init has reaped an orphan."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            ended = asyncio.Event()
            asyncio.get_running_loop().add_reader(fd, ended.set)
            async with asyncio.timeout(10):
                await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


RUNS_A_PLUGIN = """
import asyncio, sys
from pathlib import Path
from vcnode.drivers.network.cni import plugins
asyncio.run(plugins.run(Path(sys.argv[1]), {"CNI_COMMAND": "ADD"}, b"", timeout_s=60))
"""


async def test_a_plugin_ends_with_the_node_agent(plugins: Plugins, tmp_path: Path) -> None:
    """Or it would go on making a network after the next node agent has removed it."""
    os.mkfifo(begun := tmp_path / "begun")
    plugins.write("slow", add=f"echo $$ >{begun}; exec sleep 60")
    program = (sys.executable, "-c", RUNS_A_PLUGIN, str(plugins.directory / "slow"))
    process = await asyncio.create_subprocess_exec(*program)
    pid = int(await asyncio.wait_for(asyncio.to_thread(begun.read_text), LIMIT_S))
    pidfd = os.pidfd_open(pid)
    try:
        process.kill()
        await process.wait()
        ended = await asyncio.to_thread(select.select, [pidfd], [], [], LIMIT_S)
    finally:
        os.close(pidfd)
    assert ended[0], "the plugin goes on"
