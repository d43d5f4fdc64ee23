"""Curve keys of NATS (xkeys): how they are written, and what is sealed with them.

A box is for one receiver, and tells him who sealed it. It is what the NATS project's own nkeys libraries make
and open (``xkeys.go``): ``xkv1``, a nonce of 24 bytes, then NaCl's box (X25519, XSalsa20, Poly1305).

Source: nats-io/nkeys, xkeys.go and strkey.go.
"""

from __future__ import annotations

import base64
import binascii
import struct

from nacl.exceptions import CryptoError
from nacl.public import Box, PrivateKey, PublicKey

_PREFIX_SEED = 18 << 3
_PREFIX_CURVE = 23 << 3
_MAGIC = b"xkv1"
_KEY_BYTES = 32


class BadKeyError(ValueError):
    """A text that is no key, or a box that does not open; the text names neither key nor content."""


class CurveKey:
    """A private key.

    Args:
        raw: Its 32 bytes.
    """

    def __init__(self, raw: bytes) -> None:
        self._key = PrivateKey(raw)

    @classmethod
    def make(cls) -> CurveKey:
        """A new one."""
        return cls(PrivateKey.generate().encode())

    @classmethod
    def from_seed(cls, text: str) -> CurveKey:
        """The key of a seed (``SX…``). Raises BadKeyError."""
        raw = _decode(text)
        if len(raw) != 2 + _KEY_BYTES or (raw[0] & 0xF8, (raw[0] & 7) << 5 | raw[1] >> 3) != (
            _PREFIX_SEED,
            _PREFIX_CURVE,
        ):
            raise BadKeyError("This is no seed of a curve key (SX…).")
        return cls(raw[2:])

    @property
    def seed(self) -> str:
        """The key as text (``SX…``)."""
        head = bytes([_PREFIX_SEED | _PREFIX_CURVE >> 5, (_PREFIX_CURVE & 31) << 3])
        return _encode(head + self._key.encode())

    @property
    def public(self) -> str:
        """What others seal for (``X…``)."""
        return _encode(bytes([_PREFIX_CURVE]) + self._key.public_key.encode())

    def seal(self, content: bytes, receiver: str) -> bytes:
        """A box that only the key of *receiver* (``X…``) opens. Raises BadKeyError."""
        return _MAGIC + Box(self._key, _public(receiver)).encrypt(content)

    def open(self, box: bytes, sender: str) -> bytes:
        """What *sender* (``X…``) has sealed for this key. Raises BadKeyError."""
        if not box.startswith(_MAGIC):
            raise BadKeyError("This is no sealed box (xkv1).")
        try:
            return Box(self._key, _public(sender)).decrypt(box[len(_MAGIC) :])
        except (CryptoError, ValueError) as exc:
            raise BadKeyError("The box was sealed by or for another key, or it was changed.") from exc


def _public(text: str) -> PublicKey:
    raw = _decode(text)
    if len(raw) != 1 + _KEY_BYTES or raw[0] != _PREFIX_CURVE:
        raise BadKeyError("This is no public curve key (X…).")
    return PublicKey(raw[1:])


def _encode(raw: bytes) -> str:
    return base64.b32encode(raw + struct.pack("<H", _crc16(raw))).decode().rstrip("=")


def _decode(text: str) -> bytes:
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError) as exc:
        raise BadKeyError("This is no key: not base32.") from exc
    if len(raw) < 4 or struct.unpack("<H", raw[-2:])[0] != _crc16(raw[:-2]):
        raise BadKeyError("This is no key: its checksum is wrong.")
    return raw[:-2]


def _crc16(data: bytes) -> int:
    return binascii.crc_hqx(data, 0)  # CRC-CCITT with polynomial 0x1021, XMODEM: that of nkeys
