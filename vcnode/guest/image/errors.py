"""The one error of the image builder."""

from __future__ import annotations


class GuestImageError(Exception):
    """The guest image is missing, broken, or cannot be built; the text is one or two sentences for people."""


class IndexOutdatedError(GuestImageError):
    """apt's lists lack a package, or name one that the archive has no more: ``apt-get update`` may help."""
