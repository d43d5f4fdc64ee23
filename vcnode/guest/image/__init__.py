"""Builder of the guest image: a directory with ``vmlinux``, ``initrd`` and ``manifest.json``.

Everything in the image comes from the host's own Debian or Ubuntu release, through its apt, but for the
guest agent, which comes from this installation. The same inputs give the same bytes.
"""

from vcnode.guest.image.build import DEFAULT_DIR, build, default_cache_dir, is_current
from vcnode.guest.image.errors import GuestImageError
from vcnode.guest.image.manifest import GuestImage, load
from vcnode.guest.image.progress import STEPS, Progress

__all__ = [
    "DEFAULT_DIR",
    "STEPS",
    "GuestImage",
    "GuestImageError",
    "Progress",
    "build",
    "default_cache_dir",
    "is_current",
    "load",
]
