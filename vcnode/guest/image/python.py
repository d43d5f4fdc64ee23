"""The guest's Python: the interpreter, and of the standard library no more than the agent imports.

Every module costs the guest memory and every clone of it too. What the agent needs is found by asking: the
packaged interpreter itself, unpacked into a scratch directory, imports everything that the agent's sources
name and tells what that loaded.
"""

from __future__ import annotations

import ast
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vcnode.guest.image import debs, elf
from vcnode.guest.image.cpio import Directory, File, Symlink, Tree
from vcnode.guest.image.errors import GuestImageError

AGENT_ROOT = "/usr/lib/vcnode"
"""Where the guest's package ``vcnode`` lies."""

_INSIDE = Path(__file__).with_name("_inside.py")
_RUN_TIMEOUT_S = 300.0
_ALWAYS = ("encodings.aliases", "encodings.ascii", "encodings.latin_1", "encodings.utf_8", "warnings")
"""Modules that the interpreter asks for by itself, where no import statement names them."""
_LIBRARY_DIR = re.compile(r"/usr/lib(64)?/((?:x86_64|aarch64)-linux-gnu/)?[^/]+\.so(\.[0-9.]+)?")
_LOADERS = {
    "ld-linux-x86-64.so.2": "/usr/lib64/ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1": "/usr/lib/ld-linux-aarch64.so.1",
}
"""Where the C library's loader has to lie. Source: the ABIs of the architectures."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The packaged interpreter, unpacked below *root* so that it can be run here."""

    root: Path
    version: str
    """Such as ``3.11``."""
    libraries: Mapping[str, Path]
    """Shared libraries by soname or file name."""

    @property
    def binary(self) -> str:
        """The interpreter's path in the guest."""
        return f"/usr/bin/python{self.version}"

    @property
    def stdlib(self) -> str:
        """The standard library's path in the guest."""
        return f"/usr/lib/python{self.version}"

    def on_host(self, path: str) -> Path:
        """Where the guest's *path* lies now."""
        return self.root / path.removeprefix("/")

    def run(self, *arguments: str) -> str:
        """Run ``_inside.py`` with *arguments* in this interpreter; returns its output.

        Raises:
            GuestImageError: It failed; the text ends with the last line of its traceback.
        """
        command = [str(self.libraries["ld-linux-x86-64.so.2"]), "--library-path"]
        command += [":".join(sorted({str(path.parent) for path in self.libraries.values()}))]
        # A fixed hash seed instead of -I (which forbids it): the same modules compile to the same bytes.
        command += [str(self.on_host(self.binary)), "-s", "-S", "-B", "-P", str(_INSIDE), *arguments]
        try:
            done = subprocess.run(
                command,
                env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_RUN_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise GuestImageError("The guest's Python does not run on this host.") from exc
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise GuestImageError(f"The guest's Python failed: {reason}")
        return done.stdout


def unpack(packages: Iterable[Path], root: Path) -> Interpreter:
    """Unpack interpreter, standard library and shared libraries below *root*.

    Raises:
        GuestImageError: A package is damaged, or there is no interpreter in them.
    """
    libraries: dict[str, Path] = {}
    links: dict[str, str] = {}
    for deb in packages:
        for path, content in debs.members(deb, _wanted):
            if isinstance(content, str):
                links[path] = content
                continue
            target = root / path.removeprefix("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            if _LIBRARY_DIR.fullmatch(path):
                libraries[target.name] = target
            target.chmod(0o755)
    for path, link in links.items():
        name, real = PurePosixPath(path).name, PurePosixPath(link).name
        if _LIBRARY_DIR.fullmatch(path) and real in libraries:
            libraries.setdefault(name, libraries[real])
    binaries = sorted(root.glob("usr/bin/python3.*"))
    if not binaries or "ld-linux-x86-64.so.2" not in libraries:
        raise GuestImageError("The packages hold no Python interpreter, or no loader for it.")
    return Interpreter(root, binaries[0].name.removeprefix("python"), libraries)


def _wanted(path: str) -> bool:
    if path.startswith("/usr/bin/"):
        return re.fullmatch(r"/usr/bin/python3\.\d+", path) is not None
    return _LIBRARY_DIR.fullmatch(path) is not None or path.startswith("/usr/lib/python3")


def import_roots(sources: Mapping[str, bytes]) -> list[tuple[str, ...]]:
    """What the agent's *sources* import of the standard library: ``(module,)`` or ``(module, name, …)``.

    Imports inside functions count; those for type checkers only do not.

    Raises:
        GuestImageError: A source is not Python.
    """
    roots: set[tuple[str, ...]] = set()
    for path, source in sources.items():
        try:
            tree = ast.parse(source, path)
        except (SyntaxError, ValueError) as exc:
            raise GuestImageError(f"The agent's {path} is not valid Python.") from exc
        roots.update(_imports(tree))
    return sorted(root for root in roots if root[0].partition(".")[0] != "vcnode")


def _imports(node: ast.AST) -> Iterator[tuple[str, ...]]:
    match node:
        case ast.Import(names):
            yield from ((alias.name,) for alias in names)
        case ast.ImportFrom(str(module), names, 0):
            yield (module, *sorted(alias.name for alias in names if alias.name != "*"))
        case ast.If(ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), _, otherwise):
            for statement in otherwise:
                yield from _imports(statement)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _imports(child)


def install(interpreter: Interpreter, agent_sources: Mapping[str, bytes], tree: Tree, scratch: Path) -> int:
    """Put interpreter, needed modules, libraries and the agent into *tree*; returns the count of modules.

    Modules are there in compiled form only, beside where their source would be: one file to look for.

    Args:
        interpreter: The unpacked interpreter.
        agent_sources: Path below AGENT_ROOT to content.
        tree: The guest's file tree.
        scratch: An empty directory.

    Raises:
        GuestImageError: The agent imports what the interpreter lacks, or a shared library is missing.
    """
    modules = needed_modules(interpreter, agent_sources)
    sources: dict[str, Path] = {}  # path in the guest: source on the host
    binaries = [interpreter.on_host(interpreter.binary).read_bytes()]
    tree.add(interpreter.binary, File(binaries[0], 0o755))
    tree.add("/usr/bin/python3", Symlink(PurePosixPath(interpreter.binary).name))
    for file in modules:
        guest_path = "/" + str(file.relative_to(interpreter.root))
        if file.suffix == ".py":
            sources[guest_path] = file
        else:
            binaries.append(file.read_bytes())
            tree.add(guest_path, File(binaries[-1], 0o755))
    tree.add(
        f"{interpreter.stdlib}/lib-dynload", Directory()
    )  # its absence would be complained about at start
    for path, content in agent_sources.items():
        file = scratch / "agent" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        sources[f"{AGENT_ROOT}/{path}"] = file
    for path, content in compile_modules(interpreter, sources, scratch).items():
        tree.add(path, File(content))
    for name, content in closure(binaries, interpreter.libraries).items():
        path = _LOADERS.get(name) or f"/usr/lib/{platform.machine()}-linux-gnu/{name}"
        tree.add(path, File(content, 0o755))
    return len(sources)


def needed_modules(interpreter: Interpreter, agent_sources: Mapping[str, bytes]) -> list[Path]:
    """Files, on the host, of the standard library's modules that the agent needs.

    Raises:
        GuestImageError: The agent imports something that the interpreter lacks.
    """
    roots = [*import_roots(agent_sources), *((name,) for name in _ALWAYS)]
    found = json.loads(interpreter.run("imported", "\n".join(" ".join(root) for root in roots)))
    stdlib = interpreter.on_host(interpreter.stdlib)
    files = {Path(module["file"]) for module in found}
    if strangers := sorted(str(file) for file in files if not file.is_relative_to(stdlib)):
        raise GuestImageError(f"The guest's Python imported modules of the host: {', '.join(strangers)}.")
    # os is part of the binary, but its file is the landmark by which Python finds its library.
    return sorted({*files, stdlib / "os.py"})


def compile_modules(interpreter: Interpreter, sources: Mapping[str, Path], scratch: Path) -> dict[str, bytes]:
    """Compile with the guest's own interpreter; returns path in the guest (``….pyc``) to content.

    Raises:
        GuestImageError: A source does not compile.
    """
    output = scratch / "compiled"
    output.mkdir(parents=True)
    jobs: Sequence[dict[str, str]] = [
        {"source": str(source), "shown": path, "output": str(output / str(number))}
        for number, (path, source) in enumerate(sorted(sources.items()))
    ]
    todo = scratch / "jobs.json"
    todo.write_text(json.dumps(jobs), encoding="utf-8")
    interpreter.run("compiled", str(todo))
    return {job["shown"] + "c": Path(job["output"]).read_bytes() for job in jobs}


def closure(binaries: Iterable[bytes], libraries: Mapping[str, Path]) -> dict[str, bytes]:
    """The shared libraries, by soname, that *binaries* need, directly or not.

    Raises:
        GuestImageError: One is not among *libraries*.
    """
    found: dict[str, bytes] = {}
    queue = list(binaries)
    while queue:
        for name in elf.needed_libraries(queue.pop()):
            if name not in found:
                if name not in libraries:
                    raise GuestImageError(f"The shared library {name} is in none of the packages.")
                found[name] = libraries[name].read_bytes()
                queue.append(found[name])
    # The interpreter names its loader in a program header, not among the needed libraries.
    loader = "ld-linux-x86-64.so.2"
    return {**found, loader: libraries[loader].read_bytes()}
