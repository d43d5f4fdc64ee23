"""SIGKILL of real node agents between the steps in which the real storage makes an image."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartNats
from tests.faults.lives import Died, Host, hosts
from tests.support import registry as registries
from tests.support.images import entry, layer, layout

pytestmark = [
    pytest.mark.nats,
    pytest.mark.vm,  # none is started, but the real drivers want what VMs need
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not (shutil.which("docker-registry") and shutil.which("skopeo")),
        reason="needs docker-registry and skopeo (dev/setup --tests)",
    ),
]

DEATHS = [
    ("image.pull", "image.fetch:1=kill(after)"),
    ("image.pull", "image.unpack:1=kill(after)"),
    ("image.pull", "image.mkfs:1=kill(after)"),
    ("image.pull", "image.rename:1=kill(after)"),
    ("image.import", "image.rename:1=kill(after)"),
]
"""A command, and where the life dies that carries it out; before a step is after the one before."""


def files(host: Host) -> list[str]:
    """What lies in the directory of images, half-done or not."""
    top = Path(host.settings["state_dir"], "images")
    return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.name != "tmp")


async def test_an_image_half_made_leaves_nothing_and_can_be_made_again(
    start_nats: StartNats, guest_image: Path, short_dir: Path, tmp_path: Path
) -> None:
    server = await start_nats()
    tree = short_dir / "roots" / "tree"
    tree.mkdir(parents=True)
    (tree / "file").write_text("content")
    with registries.running(tmp_path) as registry:
        made = layout(tmp_path / "layout", layer(entry("bin/app", b"#!" * 1000)))
        reference = registry.push(made, "team/app:1")
        auth = {"username": registries.USER, "password": registries.PASSWORD}
        bodies: dict[str, dict[str, Any]] = {
            "image.pull": {"reference": reference, "name": "app", "auth": auth},
            "image.import": {"name": "tree", "path": str(tree)},
        }
        settings = {
            "guest_dir": str(guest_image),
            "allowed_roots": [str(short_dir / "roots")],
            "qemu": {"accel": "tcg"},
            "images": {"cert_dir": str(registry.cert_dir)},
        }
        async with hosts(server.url, settings, short_dir) as make:
            host: Host = make("h")
            before = ""
            for number, (verb, death) in enumerate([*DEATHS, ("", "")]):
                await host.start(death)
                where = f"after {before}"
                assert files(host) == [], where  # a renamed file of which no record tells is nobody's, too
                audit = await host.read("node.audit")
                assert [h for h in audit["holdings"] if h["orphan"]] == [], where
                assert (await host.read("image.list"))["images"] == [], where
                if before:
                    told = await host.ask(f"c-{number - 1}", *host.asked[f"c-{number - 1}"])
                    assert told["code"] == "internal", f"{where}: {told}"
                    assert told["details"]["restarted"], where
                if death:
                    with pytest.raises(Died):
                        await host.ask(f"c-{number}", verb, bodies[verb])
                    assert host.ended is not None
                    assert host.ended.result() == signal.SIGKILL
                    assert files(host) != [], "it died before it had done anything"
                before = f"{verb} {death}"
            for name, verb in (("app", "image.pull"), ("tree", "image.import")):
                assert (await host.ask(f"again-{name}", verb, bodies[verb]))["name"] == name, host.tail()
            assert len(files(host)) == 2

            # The database is lost, and a file is half written: the start of the next life removes all of it.
            await host.kill()
            state = Path(host.settings["state_dir"])
            for path in state.glob("node.db*"):
                path.unlink()
            (state / "images" / "tmp" / "half").mkdir()
            await host.start()
            assert files(host) == []
            assert (await host.ask("after-loss", "image.pull", bodies["image.pull"]))["name"] == "app"
            assert await host.stop() == 0
            with contextlib.suppress(FileNotFoundError):
                assert os.listdir(state / "images" / "tmp") == []
