"""Build the guest image: packages of the host's release in, kernel and initrd out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vcnode import __version__
from vcnode.guest.image import cpio, debs, initrd, kernel_packages, manifest, packages, place, python, sources
from vcnode.guest.image.errors import GuestImageError, IndexOutdatedError
from vcnode.guest.image.manifest import GuestImage
from vcnode.guest.image.packages import Apt, Index, Selection
from vcnode.guest.image.progress import Progress, Report, silent

DEFAULT_DIR = Path("/var/lib/vcnode/guest")
"""Where the node agent looks for the image unless its settings say otherwise."""

_BUSYBOX = ("/usr/bin/busybox",)


def default_cache_dir() -> Path:
    """Where downloaded packages are kept: the system's cache for root, otherwise the user's own."""
    if os.geteuid() == 0:
        return Path("/var/cache/vcnode")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcnode"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that an image is made of."""

    selection: Selection
    agent: Mapping[str, bytes]

    def facts(self) -> dict[str, object]:
        """What the manifest says about the inputs."""
        return {
            "format": manifest.FORMAT,
            "builder_version": _builder_version(),
            "agent_version": sources.agent_version(self.agent),
            "agent_digest": sources.sources_digest(self.agent),
            "packages": [
                {
                    "name": package.name,
                    "version": package.version,
                    "architecture": package.architecture,
                    "sha256": package.sha256,
                }
                for package in self.selection.all()
            ],
        }

    def digest(self) -> str:
        """Digest over the inputs, hex."""
        return manifest.digest_of(self.facts())


def build(
    out_dir: Path,
    *,
    cache_dir: Path,
    progress: Report = silent,
    force: bool = False,
    offline: bool = False,
    agent_sources: Mapping[str, bytes] | None = None,
    index: Index | None = None,
) -> GuestImage:
    """Make *out_dir* hold the current guest image; does nothing more than look if it does already.

    Blocks: some 2 s when nothing changed, 5 s when only the agent did, 15 s when the packages did, and the
    time to download 80 MB. Any number of builds at once are safe; the second waits, and then finds the work
    done.

    Args:
        out_dir: Made if missing; replaced as a whole, in one step, when the image is complete.
        cache_dir: Keeps the Debian packages that are in use, the kernel unpacked, and apt's index: 200 MB.
        progress: Hears how far the build is, in this thread.
        force: Build even if the image is current.
        offline: Download nothing; fail if a package is not in the cache.
        agent_sources: Path to content of the agent's sources; default: those of this installation.
        index: Where packages come from; default: the host's apt.

    Raises:
        GuestImageError: It cannot be built; the text says what to do. *out_dir* is as before.
    """
    out_dir = Path(os.path.abspath(out_dir))  # not resolved: a link at the end is what gets replaced
    agent = sources.agent_sources() if agent_sources is None else agent_sources
    index = Apt(cache_dir / "apt") if index is None else index

    def waiting() -> None:
        progress(Progress("resolve", 0, 1, "waiting for another build to end"))

    with contextlib.ExitStack() as stack:
        stack.enter_context(place.exclusive(out_dir.parent / f".{out_dir.name}.lock", waiting))
        stack.enter_context(place.exclusive(cache_dir / ".lock", waiting))
        inputs = Inputs(_select(index, offline, progress), agent)
        if not force and (current := _current(out_dir, inputs)) is not None:
            return current
        try:
            place.sweep(out_dir)
            scratch = stack.enter_context(place.workspace(out_dir))
            selection, files = _fetch(index, inputs.selection, cache_dir, offline, progress)
            inputs = Inputs(selection, agent)
            place.write_directory(scratch / "image", _contents(inputs, files, cache_dir, scratch, progress))
            image = manifest.load(scratch / "image")
            progress(Progress("write", 0, 1, str(out_dir)))
            place.replace_directory(scratch / "image", out_dir)
            packages.prune(cache_dir, selection.all())
        except OSError as exc:
            raise GuestImageError(f"The guest image cannot be written: {exc.strerror or exc}.") from exc
        progress(
            Progress(
                "write", 1, 1, f"{out_dir}: kernel {image.kernel_release}, Python {image.python_version}"
            )
        )
        return dataclasses.replace(image, directory=out_dir)


def is_current(image: GuestImage, *, agent_sources: Mapping[str, bytes] | None = None) -> bool:
    """Whether *image* holds the guest agent of this installation, made by this builder. Asks no apt."""
    agent = sources.agent_sources() if agent_sources is None else agent_sources
    return image.agent_digest == sources.sources_digest(agent) and image.builder_version == _builder_version()


def _builder_version() -> str:
    return f"{__version__}+{sources.builder_digest()[:12]}"


def _current(out_dir: Path, inputs: Inputs) -> GuestImage | None:
    """The image in *out_dir* if it is whole and made of *inputs*."""
    try:
        image = manifest.load(out_dir)
    except GuestImageError:  # missing or damaged: both mean that there is something to do
        return None
    return image if image.inputs_digest == inputs.digest() else None


def _select(index: Index, offline: bool, progress: Report) -> Selection:
    progress(Progress("resolve", 0, 1, "asking apt for the packages of this release"))
    try:
        selection = packages.select(index)
    except IndexOutdatedError:
        if offline or not index.refresh():
            raise
        selection = packages.select(index)
    progress(Progress("resolve", 1, 1, ", ".join(package.name for package in selection.kernel)))
    return selection


def _fetch(
    index: Index, selection: Selection, cache_dir: Path, offline: bool, progress: Report
) -> tuple[Selection, dict[str, Path]]:
    """The packages' files; with newer packages than asked for when the archive has moved on since."""

    def report(done: int, total: int) -> None:
        progress(Progress("download", done, total, ""))

    try:
        return selection, packages.fetch(index, selection.all(), cache_dir, offline=offline, report=report)
    except IndexOutdatedError:
        if offline or not index.refresh():
            raise
    selection = packages.select(index)
    return selection, packages.fetch(index, selection.all(), cache_dir, offline=offline, report=report)


def _contents(
    inputs: Inputs, files: Mapping[str, Path], cache_dir: Path, scratch: Path, progress: Report
) -> dict[str, bytes]:
    """The image's files, by name."""
    progress(Progress("python", 0, 2, "unpacking"))
    interpreter = python.unpack(
        [files[package.name] for package in inputs.selection.python], scratch / "python"
    )
    tree = initrd.skeleton()
    progress(Progress("python", 1, 2, f"Python {interpreter.version}: finding what the agent imports"))
    count = python.install(interpreter, inputs.agent, tree, scratch)
    progress(Progress("python", 2, 2, f"Python {interpreter.version}, {count} modules"))

    progress(Progress("kernel", 0, 1, "unpacking"))
    kernel = kernel_packages.cached(
        [files[package.name] for package in inputs.selection.kernel],
        cache_dir,
        kernel_packages.key(
            [package.sha256 for package in inputs.selection.kernel], sources.builder_digest()
        ),
    )
    progress(Progress("kernel", 1, 1, f"{kernel.release}, {len(kernel.modules)} modules"))

    progress(Progress("initrd", 0, 1, ""))
    facts = inputs.facts()
    initrd.add_init(tree, binary=interpreter.binary, stdlib=interpreter.stdlib)
    initrd.add_description(tree, agent_version=str(facts["agent_version"]), kernel=kernel.release)
    initrd.add_modules(tree, kernel.modules)
    busybox = _busybox(files[inputs.selection.busybox.name])
    initrd.add_busybox(tree, busybox, initrd.busybox_applets(busybox))
    archive = cpio.pack(tree)
    progress(Progress("initrd", 1, 1, f"{len(archive) / 1e6:.1f} MB"))

    outputs = {manifest.KERNEL: kernel.vmlinux, manifest.INITRD: archive}
    facts |= {
        "inputs_digest": inputs.digest(),
        "kernel_release": kernel.release,
        "python_version": interpreter.version,
        "files": {name: manifest.file_facts(content) for name, content in outputs.items()},
    }
    build_time = datetime.now(UTC).isoformat(timespec="seconds")
    return {**outputs, manifest.MANIFEST: manifest.seal(facts, build_time)}


def _busybox(deb: Path) -> bytes:
    for _, content in debs.members(deb, _BUSYBOX.__contains__):
        if isinstance(content, bytes):
            return content
    raise GuestImageError("The package busybox-static holds no busybox.")
