"""Fixtures for all tests, and the check that no test leaves anything behind."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import structlog

from tests.support import contracts, leaks, nats

StartNats = Callable[..., Awaitable[nats.NatsServer]]

_before = pytest.StashKey[leaks.Held]()


# A node that a test starts leaves the host's network alone; tests of networks make one for themselves.
os.environ.setdefault("VCNODE_NETWORK", "noop")


def pytest_configure(config: pytest.Config) -> None:
    """End in good order on SIGTERM, fixtures included; forgive testcontainers its unclosed connections."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell starts background jobs with these ignored, nohup with SIGHUP, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if nats.kind() == "testcontainers":
        config.addinivalue_line("filterwarnings", r"ignore:unclosed .*docker\.sock:ResourceWarning")


def pytest_report_header() -> str:
    """Say which kind of NATS server the tests run on."""
    return f"nats: {nats.kind()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this host cannot run; files that may take long come first.

    A long file that begins last would run alone, while the other workers have nothing left to do.
    """
    files: dict[Path, tuple[float, int]] = {}
    for item in items:
        limit_s, count = files.get(item.path, (0.0, 0))
        own = item.get_closest_marker("timeout")
        files[item.path] = (max(limit_s, own.args[0] if own else 0.0), count + 1)
    items.sort(key=lambda item: files[item.path], reverse=True)
    if os.geteuid() != 0:
        needs_root = pytest.mark.skip(reason="needs root; run dev/test, which asks sudo")
        for item in items:
            if item.get_closest_marker("root") or item.get_closest_marker("vm"):
                item.add_marker(needs_root)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo what a command run in this process makes of logging, or later tests would see no log."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("asyncio", "nats", "qemu")}
    yield
    root.setLevel(level)
    root.handlers[:] = [h for h in root.handlers if h in handlers or type(h).__module__.startswith("_pytest")]
    root.handlers += [h for h in handlers if h not in root.handlers]
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)
    structlog.reset_defaults()
    assert logging.root.manager.disable == logging.NOTSET, "the test has silenced all logging for good"


@pytest.fixture(scope="session", autouse=True)
def _watch_for_mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    leaks.directories.add(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def _hold_messages_to_the_contract() -> Iterator[None]:
    with contracts.watching():
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Remember what was held before the test's fixtures."""
    item.stash[_before] = leaks.Held()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fail the test when something is left after its fixtures were torn down."""
    result = yield
    broken = contracts.violations[:]
    contracts.violations.clear()
    if item.get_closest_marker("invented_events"):
        broken = [line for line in broken if not line.startswith("event.")]
    if broken:
        pytest.fail("not as contracts/ says:\n  " + "\n  ".join(broken[:5]), pytrace=False)
    if left := leaks.since(item.stash[_before]):
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)
    return result


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path is short enough for UNIX sockets in it (pytest's own is not)."""
    path = Path(tempfile.mkdtemp(prefix="vc-", dir="/tmp"))
    leaks.directories.add(path)
    yield path
    remove_tree(path)
    leaks.directories.discard(path)


def remove_tree(path: Path) -> None:
    """Delete *path* and all in it, unless something is mounted there: that belongs to somebody."""
    if mounted := [point for point in leaks.mounts() if Path(point).is_relative_to(path)]:
        pytest.fail(f"still mounted, so not deleted: {', '.join(mounted)}", pytrace=False)
    shutil.rmtree(path)


@pytest.fixture
def vm_dir(short_dir: Path) -> Path:
    """An empty directory for one VM, named after it, with its ``shared`` directory."""
    directory = short_dir / "vms" / f"vm-{uuid.uuid4().hex[:12]}"
    (directory / "shared").mkdir(parents=True)
    return directory


@pytest.fixture
async def start_nats(short_dir: Path) -> AsyncIterator[StartNats]:
    """Starts servers, ``await start_nats(config="…", jetstream=True)``; all of them end with the test."""
    servers: list[nats.NatsServer] = []

    async def start(
        *, config: str = "", jetstream: bool = True, directory: Path | None = None
    ) -> nats.NatsServer:
        place = directory or short_dir / f"nats{len(servers)}"
        server = nats.make(place, config=config, jetstream=jetstream)
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.stop()


@pytest.fixture
async def nats_server(start_nats: StartNats) -> nats.NatsServer:
    """A server of this test's own, with JetStream and without authentication."""
    return await start_nats()


@pytest.fixture(scope="session")
def guest_image() -> Path:
    """Directory of the guest image, built if it is not there or out of date.

    ``VCNODE_GUEST_DIR`` names another directory. A host on which it cannot be built fails the tests that
    need it: they must not pass for want of a guest.
    """
    from vcnode.guest import image

    default = image.DEFAULT_DIR if os.geteuid() == 0 else ".cache/guest"
    out_dir = Path(os.environ.get("VCNODE_GUEST_DIR", default)).absolute()
    image.build(out_dir, cache_dir=image.default_cache_dir())
    return out_dir
