"""``python -m vcnode.guest.image``: build the guest image, telling the steps in plain lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vcnode.guest.image import DEFAULT_DIR, GuestImageError, Progress, build, default_cache_dir


class Lines:
    """Prints a line for each step, and for each quarter of the download."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, progress: Progress) -> None:
        """Print *progress* unless it says nothing new."""
        text = progress.text
        if progress.step == "download":
            quarter = 4 * progress.done // max(progress.total, 1)
            text = f"{quarter * 25} % of {progress.total / 1e6:.0f} MB"
        line = f"{progress.step}: {text}".rstrip(": ")
        if line != self._last:
            print(line, flush=True)
        self._last = line


def main(arguments: list[str] | None = None) -> int:
    """Build as the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vcnode.guest.image", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_DIR, help="directory of the image (%(default)s)")
    parser.add_argument("--cache", type=Path, default=default_cache_dir(), help="package cache (%(default)s)")
    parser.add_argument("--force", action="store_true", help="build even if nothing changed")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    given = parser.parse_args(arguments)
    try:
        image = build(
            given.out, cache_dir=given.cache, progress=Lines(), force=given.force, offline=given.offline
        )
    except GuestImageError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{image.directory}: {image.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
