"""A root filesystem made of the host's static busybox: the smallest image that can do something."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from vcnode.errors import FailedPreconditionError

DIRECTORIES = ("bin", "dev", "etc", "proc", "root", "sys", "tmp")
LIST_TIMEOUT_S = 10.0


def make_root(directory: Path) -> Path:
    """Fill *directory*, which must not exist, with busybox and a link for each of its applets.

    Raises:
        FailedPreconditionError: There is no static busybox on this host.
    """
    found = shutil.which("busybox")
    if found is None or not is_static(Path(found)):
        raise FailedPreconditionError("There is no static busybox here; install Debian's busybox-static.")
    listed = subprocess.run(
        [found, "--list"], capture_output=True, text=True, timeout=LIST_TIMEOUT_S, check=True
    )
    for name in DIRECTORIES:
        (directory / name).mkdir(parents=True)
    (directory / "tmp").chmod(0o1777)
    shutil.copy2(found, directory / "bin/busybox")
    for applet in listed.stdout.split():
        link = directory / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    (directory / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"
    )
    (directory / "etc/group").write_text("root:x:0:\nnobody:x:65534:\n")
    return directory


def is_static(program: Path) -> bool:
    """Whether *program* is an ELF64 executable that needs no loader (no PT_INTERP; elf(5))."""
    with program.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\x02":
            return False
        (offset,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(offset)
        table = file.read(size * count)
    pt_interp = 3
    return all(struct.unpack_from("<I", table, n * size)[0] != pt_interp for n in range(count))
