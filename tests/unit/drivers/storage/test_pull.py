"""Pulls from a real registry, and what is left when one of them dies."""

import asyncio
import json
import os
import shutil

import pytest

from tests.support import registry as registries
from tests.support import signing
from tests.support.images import Layout, entry, layer, layout
from vcnode.drivers.base import PullSource
from vcnode.drivers.storage import tools
from vcnode.drivers.storage.images import ImageStore
from vcnode.drivers.storage.oci import architecture
from vcnode.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from vcnode.settings import ImageSettings

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not (shutil.which("docker-registry") and shutil.which("skopeo")),
        reason="needs docker-registry and skopeo (dev/setup --tests)",
    ),
]
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = {"Entrypoint": ["/bin/app"], "Cmd": ["serve"], "Env": ["A=b"], "StopSignal": "SIGQUIT"}


@pytest.fixture
def registry(tmp_path_factory):
    with registries.running(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def store(host, registry):
    made = ImageStore(
        host.state,
        host.allowed,
        ImageSettings(cert_dir=registry.cert_dir, progress_interval_s=0.1),
        reserve_bytes=0,
    )
    yield made
    assert os.listdir(host.state / "images" / "tmp") == []


def nothing(digest):
    return None


class Told:
    def __init__(self):
        self.phases = []

    async def __call__(self, progress):
        self.phases.append((progress.phase, progress.done_bytes, progress.total_bytes))


def source(reference, password=registries.PASSWORD):
    return PullSource(reference, registries.USER, password)


def pushed(registry, tmp_path, name, *layers):
    layers = layers or (layer(entry("bin/app", b"#!" * 1000, uid=7)), layer(entry("etc/x", b"y")))
    return registry.push(layout(tmp_path / "pushed", *layers, config=CONFIG), name)


async def test_an_image_is_pulled_with_credentials_and_tells_where_it_stands(store, registry, tmp_path):
    reference = pushed(registry, tmp_path, "team/app:1")
    told = Told()
    image = await store.pull(source(reference), nothing, told, timeout_s=60)
    assert image.config.entrypoint == ("/bin/app",)
    assert image.config.cmd == ("serve",)
    assert image.config.env == (("A", "b"),)
    assert image.config.stop_signal == 3
    assert image.manifest_digest is not None
    assert told.phases[0][0] == "resolving"
    assert told.phases[-1][0] == "unpacking"
    assert told.phases[-1][1] == told.phases[-1][2] > 0
    # The same content by another way is the same file.
    imported = await store.build(str(shutil.copytree(tmp_path / "pushed", store_root(store))), timeout_s=60)
    assert imported.digest == image.digest


def store_root(store):
    return store._dir.parent.parent / "roots" / "layout"


async def test_an_image_without_the_signature_that_is_demanded_is_denied_by_rule(host, registry, tmp_path):
    signed = {"type": "signedBy", "keyType": "GPGKeys", "keyData": "AAAA"}
    anything = {"type": "insecureAcceptAnything"}
    scopes = {f"{registry.address}/team": [signed], f"{registry.address}/free": [anything]}
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": scopes}}))
    settings = ImageSettings(cert_dir=registry.cert_dir, policy_file=policy)
    store = ImageStore(host.state, host.allowed, settings, reserve_bytes=0)
    for number, name in enumerate(("team/app:1", "other/app:1", "free/app:1")):
        reference = pushed(registry, tmp_path / str(number), name)
        if name.startswith("free/"):
            assert (await store.pull(source(reference), nothing, Told(), timeout_s=60)).path.exists()
            continue
        words = "has no signature, and" if name.startswith("team/") else "is refused by"
        with pytest.raises(PermissionDeniedError, match=rf"{words} .*images\.policy_file") as denied:
            await store.pull(source(reference), nothing, Told(), timeout_s=60)
        assert denied.value.details["rule"] == "images.policy_file"
    assert registry.fetched_blobs() == [p for p in registry.fetched_blobs() if "/free/" in p]
    assert os.listdir(host.state / "images" / "tmp") == []


@pytest.mark.skipif(not shutil.which("gpg"), reason="needs gpg (dev/setup --tests)")
async def test_what_is_wrong_with_a_signature_is_told(host, registry, tmp_path, monkeypatch):
    with signing.signer(tmp_path) as signer:
        trusted = signer.key("trusted@example.org")
        signer.key("other@example.org")
        demanded = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(trusted)}
        policy = tmp_path / "policy.json"
        scopes = {registry.address: [demanded]}
        policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": scopes}}))
        images = {}
        for name in ("good", "other", "moved", "alias"):
            made = layout(tmp_path / name, layer(entry("etc/name", name.encode())), config=CONFIG)
            index = json.loads((made / "index.json").read_text())
            reference = registry.push(made, f"team/{name}:1")
            images[name] = reference, index["manifests"][0]["digest"]
        good, digest = images["good"]
        signer.sign("trusted@example.org", good, digest)
        signer.sign("other@example.org", *images["other"])
        signer.sign("trusted@example.org", images["moved"][0], digest, kept_for=images["moved"][1])
        signer.sign("trusted@example.org", good, images["alias"][1])
        os.rename(
            tmp_path / registry.address / f"team/good@{images['alias'][1].replace(':', '=')}",
            tmp_path / registry.address / f"team/alias@{images['alias'][1].replace(':', '=')}",
        )
        monkeypatch.setenv("PATH", f"{signer.skopeo(registry.address)}:{os.environ['PATH']}")
        settings = ImageSettings(cert_dir=registry.cert_dir, policy_file=policy)
        store = ImageStore(host.state, host.allowed, settings, reserve_bytes=0)
        assert (await store.pull(source(good), nothing, Told(), timeout_s=60)).path.exists()
        for name, words in {
            "other": r"by key [0-9A-F]{40}, which is not one of the node's signature policy",
            "moved": rf"made for another content \({digest}\)",
            "alias": rf"made for another name \({good}\)",
        }.items():
            with pytest.raises(PermissionDeniedError, match=words):
                await store.pull(source(images[name][0]), nothing, Told(), timeout_s=60)


async def test_what_is_here_already_is_not_fetched_again(store, registry, tmp_path):
    reference = pushed(registry, tmp_path, "team/known:1")
    first = await store.pull(source(reference), nothing, Told(), timeout_s=60)
    before = len(registry.fetched_blobs())
    assert before == 3  # two layers and the config, each once
    again = await store.pull(
        source(reference),
        lambda digest: (first.digest, first.config) if digest == first.manifest_digest else None,
        Told(),
        timeout_s=60,
    )
    assert again == first
    assert len(registry.fetched_blobs()) == before
    # A file that is gone is fetched again.
    store.remove(first.digest)
    again = await store.pull(
        source(reference), lambda digest: (first.digest, first.config), Told(), timeout_s=60
    )
    assert again.digest == first.digest
    assert again.path.exists()


async def test_an_index_gives_the_image_of_this_architecture(store, registry, tmp_path):
    made = Layout(tmp_path / "multi")
    ours = made.image([layer(entry("ours"))], CONFIG)
    other = made.image([layer(entry("other"))])
    ours["platform"] = {"os": "linux", "architecture": architecture()}
    other["platform"] = {"os": "linux", "architecture": "mips"}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [ours, other]}
    made.index(made.blob(json.dumps(index).encode(), INDEX))
    reference = registry.push(made.path, "multi:1", "--all")
    image = await store.pull(source(reference), nothing, Told(), timeout_s=60)
    assert image.config.entrypoint == ("/bin/app",)
    assert image.manifest_digest == ours["digest"]


async def test_wrong_names_passwords_and_registries_are_told_apart(store, registry, tmp_path, host):
    reference = pushed(registry, tmp_path, "team/secret:1")
    with pytest.raises(InvalidArgumentError, match="refuses these credentials"):
        await store.pull(source(reference, "wrong"), nothing, Told(), timeout_s=60)
    with pytest.raises(InvalidArgumentError, match="wants some"):
        await store.pull(PullSource(reference), nothing, Told(), timeout_s=60)
    with pytest.raises(NotFoundError):
        await store.pull(source(f"{registry.address}/team/none:1"), nothing, Told(), timeout_s=60)
    with pytest.raises(UnavailableError):
        await store.pull(source("127.0.0.1:1/x:1"), nothing, Told(), timeout_s=60)
    distrusting = ImageStore(host.state, host.allowed, ImageSettings(), reserve_bytes=0)
    with pytest.raises(UnavailableError, match="not trusted"):
        await distrusting.pull(source(reference), nothing, Told(), timeout_s=60)


@pytest.mark.parametrize("phase", ["resolving", "downloading", "unpacking"])
async def test_a_pull_that_is_cut_off_leaves_nothing(store, registry, tmp_path, host, phase):
    reference = pushed(registry, tmp_path, f"team/cut-{phase}:1")
    reached = asyncio.Event()

    async def progress(told):
        if told.phase == phase:
            reached.set()
            await asyncio.Event().wait()

    pull = asyncio.ensure_future(store.pull(source(reference), nothing, progress, timeout_s=60))
    await reached.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert os.listdir(host.state / "images") == ["tmp"]


async def test_a_pull_that_is_late_leaves_nothing(store, registry, tmp_path, host):
    reference = pushed(registry, tmp_path, "team/late:1")

    async def progress(told):
        if told.phase == "unpacking":
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceededError):
        await store.pull(source(reference), nothing, progress, timeout_s=3)
    assert os.listdir(host.state / "images") == ["tmp"]


async def test_an_image_larger_than_allowed_is_refused(registry, tmp_path, host):
    bomb = layer(entry("zeros", bytes(3 * 1024 * 1024)))
    reference = pushed(registry, tmp_path, "team/bomb:1", bomb)
    small = ImageStore(
        host.state, host.allowed, ImageSettings(cert_dir=registry.cert_dir, max_size_mib=2), reserve_bytes=0
    )
    with pytest.raises(InvalidArgumentError, match="larger than an image may be"):
        await small.pull(source(reference), nothing, Told(), timeout_s=60)
    assert os.listdir(host.state / "images") == ["tmp"]
    assert os.listdir(host.state / "images" / "tmp") == []


async def test_the_password_is_in_no_argument(store, registry, tmp_path, monkeypatch):
    reference = pushed(registry, tmp_path, "team/quiet:1")
    seen = []
    run = tools.run

    async def spy(argv, **options):
        seen.append(" ".join(argv) + str(options.get("env")))
        return await run(argv, **options)

    monkeypatch.setattr(tools, "run", spy)
    await store.pull(source(reference), nothing, Told(), timeout_s=60)
    assert len(seen) > 2
    assert not [line for line in seen if registries.PASSWORD in line]
