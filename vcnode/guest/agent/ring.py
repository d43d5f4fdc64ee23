"""The last bytes of an endless stream."""

from __future__ import annotations


class Ring:
    """Keeps the last *size_bytes* bytes that were added."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._content = bytearray()
        self.total_bytes = 0
        """How many bytes were ever added."""

    def add(self, data: bytes) -> None:
        """Append *data*; the oldest bytes make room."""
        self.total_bytes += len(data)
        self._content += data
        if (excess := len(self._content) - self._size) > 0:
            del self._content[:excess]

    @property
    def content(self) -> bytes:
        """What is kept, oldest first."""
        return bytes(self._content)
