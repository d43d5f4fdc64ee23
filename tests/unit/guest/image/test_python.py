from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.guest.image import elves
from tests.unit.guest.image.archives import make_deb
from vcnode.guest.image import python
from vcnode.guest.image.errors import GuestImageError


def _roots(source: str) -> list[tuple[str, ...]]:
    return python.import_roots({"vcnode/guest/agent/x.py": source.encode()})


@pytest.mark.parametrize(
    ("source", "roots"),
    [
        ("import os, json.decoder", [("json.decoder",), ("os",)]),
        ("import a.b as c", [("a.b",)]),
        ("from ctypes import util, CDLL", [("ctypes", "CDLL", "util")]),
        ("from os import *", [("os",)]),
        ("def f():\n    if x:\n        import fcntl", [("fcntl",)]),
        ("try:\n    import a\nexcept ImportError:\n    import b", [("a",), ("b",)]),
        ("from __future__ import annotations", [("__future__", "annotations")]),
        ("import vcnode.guest\nfrom vcnode.guest import protocol", []),
        ("if TYPE_CHECKING:\n    import typing\nelse:\n    import os", [("os",)]),
        ("import typing\nif typing.TYPE_CHECKING:\n    import asyncio", [("typing",)]),
        ("x = 1", []),
    ],
)
def test_imports_of_the_agent(source: str, roots: list[tuple[str, ...]]) -> None:
    assert _roots(source) == roots


@pytest.mark.parametrize("source", ["def f(:", "\0"])
def test_a_source_that_is_not_python_is_named(source: str) -> None:
    with pytest.raises(GuestImageError, match=r"vcnode/guest/agent/x\.py"):
        _roots(source)


def _library(directory: Path, name: str, *needed: str) -> Path:
    path = directory / name
    path.write_bytes(elves.program(*needed))
    return path


def test_libraries_of_libraries_come_along_and_others_do_not(tmp_path: Path) -> None:
    libraries = {
        "libz.so.1": _library(tmp_path, "libz.so.1", "libc.so.6"),
        "libc.so.6": _library(tmp_path, "libc.so.6", "ld-linux-x86-64.so.2"),
        "ld-linux-x86-64.so.2": _library(tmp_path, "ld-linux-x86-64.so.2"),
        "libunused.so.1": _library(tmp_path, "libunused.so.1"),
    }
    found = python.closure([elves.program("libz.so.1")], libraries)
    assert found.keys() == {"libz.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    libraries = {"ld-linux-x86-64.so.2": _library(tmp_path, "ld-linux-x86-64.so.2")}
    with pytest.raises(GuestImageError, match=r"libffi\.so\.8"):
        python.closure([elves.program("libffi.so.8")], libraries)


def test_unpacked_packages_are_an_interpreter(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "/usr/bin/python3.12": b"binary",
        "/usr/bin/pdb3.12": b"unwanted",
        "/usr/lib/python3.12/os.py": b"source",
        "/lib/x86_64-linux-gnu/libz.so.1.3": b"zlib",
        "/lib/x86_64-linux-gnu/libz.so.1": "libz.so.1.3",
        "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": b"loader",
        "/lib64/ld-linux-x86-64.so.2": "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        "/usr/share/doc/x/copyright": b"unwanted",
    }
    interpreter = python.unpack([make_deb(tmp_path, files)], tmp_path / "out")
    assert interpreter.version == "3.12"
    assert interpreter.binary == "/usr/bin/python3.12"
    assert interpreter.on_host("/usr/lib/python3.12/os.py").read_bytes() == b"source"
    assert interpreter.libraries["libz.so.1"].read_bytes() == b"zlib"
    assert interpreter.libraries["ld-linux-x86-64.so.2"].read_bytes() == b"loader"
    assert not (tmp_path / "out/usr/bin/pdb3.12").exists()
    assert not (tmp_path / "out/usr/share").exists()


def test_packages_without_an_interpreter_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match="no Python interpreter"):
        python.unpack([make_deb(tmp_path, {"/usr/share/doc/x": b""})], tmp_path / "out")


def test_an_interpreter_that_does_not_run_here_is_an_error(tmp_path: Path) -> None:
    loader = tmp_path / "ld-linux-x86-64.so.2"
    loader.write_bytes(b"\x7fELF but not really")
    loader.chmod(0o755)
    interpreter = python.Interpreter(tmp_path, "3.11", {"ld-linux-x86-64.so.2": loader})
    with pytest.raises(GuestImageError, match="does not run on this host"):
        interpreter.run("imported", "")


def test_a_failure_inside_the_interpreter_is_told_by_its_last_line(tmp_path: Path) -> None:
    loader = tmp_path / "ld-linux-x86-64.so.2"
    loader.write_text(
        "#!/bin/sh\necho Traceback >&2\necho \"ModuleNotFoundError: No module named 'x'\" >&2\nexit 1\n"
    )
    loader.chmod(0o755)
    interpreter = python.Interpreter(tmp_path, "3.11", {"ld-linux-x86-64.so.2": loader})
    with pytest.raises(GuestImageError, match="No module named 'x'"):
        interpreter.run("imported", "x")
