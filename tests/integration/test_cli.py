"""The command line against a whole node agent (with the mock hypervisor) over a real NATS server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import pytest

from tests.integration.conftest import mock_settings
from tests.support.cli import Result, vcnode
from tests.support.nats import NatsServer
from vcnode.cli.complete import complete_container, complete_pod
from vcnode.models.call import Call
from vcnode.models.stats import PodStats, PodStatsOf
from vcnode.node import Node, running

pytestmark = pytest.mark.nats

Shell = Callable[..., Awaitable[Result]]


@pytest.fixture
def sh(mock_node: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs ``vcnode …`` against the node."""
    monkeypatch.setenv("VCNODE_NATS_URL", nats_server.url)
    monkeypatch.setenv("VCNODE_NODE", mock_node.settings.node_name)
    for name in ("VCNODE_OUTPUT", "VCNODE_NATS_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return vcnode


async def ok(command: Awaitable[Result]) -> Result:
    result = await command
    assert (result.code, result.err) == (0, "")
    return result


@pytest.fixture
async def image(sh: Shell, mock_node: Node) -> str:
    """An image on the node."""
    await ok(sh("image", "import", "busybox", str(mock_node.settings.allowed_roots[0])))
    return "busybox"


async def test_a_pod_from_run_to_delete(sh: Shell, image: str) -> None:
    run = await ok(
        sh("pod", "run", "--id", "p1", "--image", image, "--memory", "256", "-l", "a=b", "--", "sleep", "9")
    )
    assert "p1" in run.out
    assert "running" in run.out

    listed = (await ok(sh("pod", "list", "-o", "json", "--label", "a=b", "--state", "running"))).json
    assert [pod["pod_id"] for pod in listed["pods"]] == ["p1"]
    table = await ok(sh("pod", "list"))
    assert table.out.splitlines()[1].split()[:3] == ["p1", "running", "1/1"]

    status = (await ok(sh("-o", "json", "container", "status", "p1", "main"))).json
    assert (status["state"], status["image"]) == ("running", image)

    stopped = await ok(sh("pod", "stop", "p1", "--grace", "0"))
    assert "p1 is stopped" in stopped.out
    assert (await ok(sh("pod", "delete", "p1"))).out == "p1 deleted\n"
    assert (await ok(sh("pod", "delete", "p1"))).out == "p1 did not exist\n"


async def test_containers_come_and_go(sh: Shell, image: str) -> None:
    await ok(sh("pod", "run", "--id", "p1"))
    await ok(sh("container", "create", "p1", "--id", "c1", "--image", image, "--", "sleep", "9"))
    await ok(sh("container", "start", "p1", "c1"))
    await ok(sh("container", "kill", "p1", "c1", "-s", "TERM"))
    await ok(sh("container", "stop", "p1", "c1"))
    states = (await ok(sh("container", "list", "p1", "-o", "json"))).json["containers"]
    assert [(c["container_id"], c["state"]) for c in states] == [("c1", "stopped")]
    assert (await ok(sh("container", "delete", "p1", "c1"))).out == "p1/c1 deleted\n"


async def test_containers_are_paused_watched_and_waited_for(sh: Shell, image: str) -> None:
    await ok(sh("pod", "run", "--id", "p1", "--image", image, "--", "sleep", "infinity"))
    assert "paused" in (await ok(sh("container", "pause", "p1", "main"))).out
    assert "running" in (await ok(sh("container", "resume", "p1", "main"))).out
    for name in ("ps", "processes"):
        table = (await ok(sh("container", name, "p1", "main"))).out.splitlines()
        assert table[1].split()[0] == "1"
        assert table[1].endswith("sleep infinity")
    assert (await sh("container", "wait", "p1", "main", "--deadline", "0.05")).code == 125
    assert "paused" in (await ok(sh("pod", "pause", "p1"))).out
    assert "running" in (await ok(sh("pod", "resume", "p1"))).out
    await ok(sh("container", "wait", "p1", "main", "--for", "running"))
    await ok(sh("container", "kill", "p1", "main", "-s", "SIGTERM"))
    waited = await sh("container", "wait", "p1", "main")
    assert (waited.code, waited.out) == (143, "143\n")
    assert "143 (SIGTERM)" in (await ok(sh("container", "list"))).out
    assert (await sh("container", "wait", "p1", "main", "--for", "dead")).code == 2


async def test_limits_and_memory_are_changed(sh: Shell, image: str) -> None:
    rules = ("--template", "never", "--on-disconnect", "stop:60", "--readiness-probe", "period=0.1,tcp:80")
    await ok(sh("pod", "run", "--id", "p1", "--image", image, *rules, "--", "sleep", "infinity"))
    assert "stop after 60 s" in (await ok(sh("pod", "status", "p1"))).out
    changed = await ok(sh("container", "update", "p1", "main", "--pids-limit", "9", "-o", "json"))
    assert changed.json["resources"]["pids_limit"] == 9
    lifted = await ok(sh("container", "update", "p1", "main", "--pids-limit", "none", "-o", "json"))
    assert lifted.json["resources"]["pids_limit"] is None
    assert (await sh("container", "update", "p1", "main")).code == 2
    assert "128 MiB" in (await ok(sh("pod", "resize", "p1", "--memory", "128"))).out
    assert (await sh("pod", "resize", "p1", "--memory", "4096")).code == 2


async def test_stats_are_shown_once_or_followed(
    sh: Shell, image: str, mock_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ok(sh("pod", "run", "--id", "p1", "--image", image, "--", "sleep", "infinity"))
    table = (await ok(sh("pod", "stats", "p1"))).out.splitlines()
    assert [line.split()[0] for line in table[2:]] == ["vm", "guest", "main"]
    found = (await ok(sh("pod", "stats", "p1", "--no-guest", "-o", "json"))).json
    assert (found["mock"], found["guest"], found["containers"]) == (True, None, [])
    asked: asyncio.Queue[PodStatsOf] = asyncio.Queue()
    stats = mock_node.pods.stats

    def noted(request: PodStatsOf, call: Call) -> Awaitable[PodStats]:
        asked.put_nowait(request)
        return stats(request, call)

    monkeypatch.setattr(mock_node.pods, "stats", noted)
    follow = asyncio.ensure_future(sh("pod", "stats", "p1", "-f", "--interval", "0.1", "-o", "json"))
    assert [(await asked.get()).after is None for _ in range(3)] == [True, False, False]
    await mock_node.pods.stop("p1", 0, Call("stop-1", "pod.stop"))
    samples = [json.loads(line) for line in (await ok(follow)).out.splitlines()]
    assert len(samples) >= 2
    assert [s["time"] for s in samples] == sorted({s["time"] for s in samples})
    assert (await sh("pod", "stats", "p1")).code == 4


async def test_restart_policies_are_flags(sh: Shell, image: str) -> None:
    run = ("pod", "run", "--id", "p1", "--image", image, "--restart-pod", "always")
    await ok(sh(*run, "--restart", "on-failure:3", "--", "sleep", "infinity"))
    await ok(sh("container", "kill", "p1", "main"))
    status = (await ok(sh("container", "status", "p1", "main", "-o", "json"))).json
    assert (status["state"], status["exit_code"]) == ("stopped", 137)
    assert status["restart_at"] is not None
    assert "restarts at" in (await ok(sh("container", "status", "p1", "main"))).out
    await ok(sh("container", "wait", "p1", "main", "--for", "running"))
    assert "SIGKILL" not in (await ok(sh("container", "status", "p1", "main"))).out
    await ok(sh("pod", "delete", "--force", "p1"))
    assert (await sh(*run, "--restart", "always:3")).code == 2
    assert (await sh(*run, "--restart", "on-failure:x")).code == 2
    assert (await sh(*run, "--restart", "sometimes")).code == 2


async def test_exec_passes_output_and_exit_code_on(sh: Shell, image: str) -> None:
    await ok(sh("pod", "run", "--id", "p1", "--image", image, "--", "sleep", "9"))

    done = await sh("container", "exec", "p1", "main", "--", "sh", "-c", "echo out; exit 3")
    assert (done.code, done.out) == (3, "out\n")
    as_json = await sh("container", "exec", "-o", "json", "p1", "main", "sh", "-c", "exit 4")
    assert as_json.code == 4
    assert as_json.json["exit_code"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("pod status nope", 3, "nope"),
        ("pod start nope", 3, "nope"),
        ("container exec nope main -- ls", 125, "nope"),
        ("pod run --id No! --image busybox", 2, "id:"),
        ("pod run --id p --image missing -- ls", 3, "missing"),
        ("pod run --id p --memory 1", 2, "resources.mem_size_mib"),
        ("pod list --state odd", 2, "states"),
        ("pod list --node No!", 2, "No!"),
        ("pod run -f /does/not/exist", 2, "/does/not/exist"),
        ("image import x /etc", 2, "/etc"),
        ("container kill p c -s NOPE", 2, "NOPE"),
        ("events --kind pod.exploded", 2, "pod.exploded"),
        ("node info --node other", 5, "other"),
        ("node ping --node other", 5, "other"),
        ("pod list --config /does/not/exist", 2, "/does/not/exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_failures_have_their_exit_code_and_say_why(
    sh: Shell, arguments: str, code: int, words: str
) -> None:
    result = await sh(*arguments.split())

    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert words in result.err
    assert len(result.err.splitlines()) <= 4


async def test_errors_are_json_for_programs(sh: Shell) -> None:
    result = await sh("pod", "status", "nope", "-o", "json")

    assert result.code == 3
    assert json.loads(result.err)["error"]["code"] == "not_found"


async def test_a_running_pod_is_not_deleted_without_force(sh: Shell) -> None:
    await ok(sh("pod", "run", "--id", "p1"))

    refused = await sh("pod", "delete", "p1")
    assert refused.code == 4
    assert "running" in refused.err
    await ok(sh("pod", "delete", "--force", "p1"))


async def test_specs_come_from_files_and_standard_input(sh: Shell, image: str, tmp_path: Path) -> None:
    file = tmp_path / "pod.toml"
    file.write_text(f'id = "a"\n[[containers]]\nid = "c"\nimage = "{image}"\ncmd.args = ["sleep", "9"]\n')

    await ok(sh("pod", "create", "-f", str(file), "--id", "b"))
    await ok(sh("pod", "create", "-f", "-", stdin=b'{"id": "c"}'))

    listed = (await ok(sh("pod", "list", "-o", "json"))).json["pods"]
    assert {pod["pod_id"]: len(pod["containers"]) for pod in listed} == {"b": 1, "c": 0}
    assert {pod["state"] for pod in listed} == {"ready"}


async def test_the_same_command_id_is_carried_out_once(sh: Shell) -> None:
    first = (await ok(sh("pod", "create", "--command-id", "x1", "-o", "json", "--id", "p1"))).json
    await ok(sh("pod", "delete", "p1"))

    again = (await ok(sh("pod", "create", "--command-id", "x1", "-o", "json", "--id", "p1"))).json

    assert again == first
    assert (await ok(sh("pod", "list", "-o", "json"))).json["pods"] == []


async def test_events_of_the_past(sh: Shell) -> None:
    await ok(sh("pod", "run", "--id", "p1"))
    await ok(sh("pod", "run", "--id", "p2"))
    await ok(sh("pod", "delete", "--force", "p2"))

    async def kinds(*arguments: str) -> list[str]:
        result = await ok(sh("events", "-o", "json", *arguments))
        return [json.loads(line)["type"] for line in result.out.splitlines()]

    # Events follow the replies; the last one of p2 shows that all before it are there.
    async with asyncio.timeout(10):
        while "vcnode.pod.deleted" not in await kinds():
            pass
    assert await kinds("--pod", "p1") == ["vcnode.pod.created", "vcnode.pod.starting", "vcnode.pod.started"]
    assert await kinds("--kind", "pod.deleted", "--since", "1h") == ["vcnode.pod.deleted"]
    assert (await ok(sh("events", "--kind", "pod.deleted"))).out.split()[1:4] == ["n1", "pod.deleted", "p2"]


async def test_with_two_nodes_one_must_be_chosen(
    sh: Shell, nats_server: NatsServer, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VCNODE_NODE")
    assert (await ok(sh("node", "info", "-o", "json"))).json["node"] == "n1"

    async with running(mock_settings(short_dir / "n2", nats_server.url, node_name="n2")) as second:
        await second.connection.wait_connected()

        undecided = await sh("pod", "list")
        assert undecided.code == 2
        assert "n1, n2" in undecided.err

        assert (await ok(sh("pod", "list", "--node", "n2", "-o", "json"))).json == {"pods": []}
        pinged = await ok(sh("node", "ping", "-o", "json"))
        assert [json.loads(line)["node"] for line in pinged.out.splitlines()] == ["n1", "n2"]


async def test_node_info_says_that_it_is_a_mock(sh: Shell) -> None:
    assert "no VM will run" in (await ok(sh("node", "info"))).out
    assert (await ok(sh("node", "info", "-o", "json"))).json["mock"] is True


async def test_names_are_completed(sh: Shell, image: str) -> None:
    await ok(sh("pod", "run", "--id", "web1", "--image", image, "--", "sleep", "9"))
    await ok(sh("pod", "create", "--id", "db1"))

    class Context:
        params: ClassVar[dict[str, str]] = {"pod_id": "web1"}

        def find_root(self) -> Context:
            return self

    ctx = Context()
    assert await asyncio.to_thread(complete_pod, ctx, "w") == ["web1"]  # type: ignore[arg-type]
    assert await asyncio.to_thread(complete_container, ctx, "") == ["main"]  # type: ignore[arg-type]


async def test_the_installed_command_prints_its_help() -> None:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("vcnode")), "--help", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()

    assert process.returncode == 0
    assert b"vcnode demo" in out
