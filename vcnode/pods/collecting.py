"""Which images go when their files take too much room. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from vcnode.models.node import ImageStatus

MIB = 1024 * 1024


def used_since(image: ImageStatus) -> datetime:
    """When an image was last made or used, as far as is known."""
    return max(image.imported_at, image.last_used_at or image.imported_at)


def total_bytes(images: Iterable[ImageStatus]) -> int:
    """Bytes of the files of *images*; names may share one."""
    return sum({image.digest: image.size_bytes for image in images}.values())


def victims(
    images: Collection[ImageStatus],
    in_use: Collection[str],
    now: datetime,
    *,
    high_mib: int,
    low_mib: int,
    min_age_s: float,
) -> list[str]:
    """Names of the images to remove, those that were not used for longest first.

    None while all files together take no more than *high_mib*; else as many as it needs to come down to
    *low_mib*, as far as unused images of at least *min_age_s* seconds allow. A file goes when its last name
    does, so removing one of two names frees nothing by itself.

    Args:
        images: All images.
        in_use: Names that containers use.
        now: The current time.
        high_mib: High watermark.
        low_mib: Low watermark.
        min_age_s: How long ago an image must have been made or used.
    """
    if total_bytes(images) <= high_mib * MIB:
        return []
    oldest = now - timedelta(seconds=min_age_s)
    left = {image.name: image for image in images}
    gone = []
    for image in sorted(images, key=lambda each: (used_since(each), each.name)):
        if total_bytes(left.values()) <= low_mib * MIB:
            break
        if image.name not in in_use and used_since(image) <= oldest:
            del left[image.name]
            gone.append(image.name)
    return gone
