"""What the header of a qcow2 image says. Pure.

An image is somebody else's, and its header can name other files of the host, which QEMU would open: such
images are refused. Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct

from vcnode.errors import InvalidArgumentError

HEADER_BYTES = 104
MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQI")
"""Magic, version, offset and length of the backing file's name, cluster bits, size, encryption."""
_INCOMPATIBLE_AT = 72
_EXTERNAL_DATA = 1 << 2


def size_bytes(header: bytes, path: str) -> int:
    """Size of the disk in an image that begins with *header*.

    Raises:
        InvalidArgumentError: It is no qcow2 image, or one that needs other files or a password.
    """
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise _refuse(path, "is no qcow2 image")
    _, version, backing_at, _, _, size, encryption = _HEADER.unpack_from(header)
    if version not in (2, 3):
        raise _refuse(path, f"is a qcow2 image of version {version}, and 2 and 3 are known")
    if backing_at:
        raise _refuse(path, "is based on another image; make one of both with 'qemu-img convert'")
    features = struct.unpack_from(">Q", header, _INCOMPATIBLE_AT)[0] if version == 3 else 0
    if features & _EXTERNAL_DATA:
        raise _refuse(path, "keeps its data in another file; make one of both with 'qemu-img convert'")
    if encryption:
        raise _refuse(path, "is encrypted")
    return int(size)


def _refuse(path: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"Disk image {path!r} {why}.", path=path)
