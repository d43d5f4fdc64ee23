"""Curve keys of NATS, as its own tools write them."""

from __future__ import annotations

import base64

import pytest

from vcnode.models.xkeys import BadKeyError, CurveKey

# Made by nkeys.js 1.1.0 (createCurve, seal): a receiver's seed and public key, a sender's public key, and
# what it sealed for the receiver.
SEED = "SXAJNCTJOB2YUISNL2UQ5CD4APAIW2GMT676DFRBB5FH2IGPR3AU5LVUCU"
PUBLIC = "XBUFJQB2VPLXTSMXELJ25L5UEFAEF4CCSDLZHDQVJIL43X7K6FVGNA6O"
SENDER = "XBW7RCEOPRUCMAHYQXXPJWGRYQZOVZC6HT34O5XMDZCIIWMV3Q3VZHK6"
BOX = "eGt2MXKEae6Rdjvz9usoj+yEZK8FnxSjaICgcXGxCbFAWN9aV+KtbZGvHpYGkUWbgal5ZC52kwDuUhs="


def test_what_another_library_of_nats_has_made_is_understood() -> None:
    key = CurveKey.from_seed(SEED)
    assert (key.public, key.seed) == (PUBLIC, SEED)
    assert key.open(base64.b64decode(BOX), SENDER) == b"from JavaScript"


def test_what_is_sealed_opens_for_the_receiver_only() -> None:
    sender, receiver, other = CurveKey.make(), CurveKey.make(), CurveKey.make()
    box = sender.seal(b"secret \x00\xff", receiver.public)
    assert box.startswith(b"xkv1")
    assert b"secret" not in box
    assert receiver.open(box, sender.public) == b"secret \x00\xff"
    assert sender.seal(b"", receiver.public) != sender.seal(b"", receiver.public)
    for key, sent_by, content in (
        (other, sender, box),
        (receiver, other, box),
        (receiver, sender, box[:-1] + bytes([box[-1] ^ 1])),
        (receiver, sender, box[:20]),
        (receiver, sender, b"xkv2" + box[4:]),
    ):
        with pytest.raises(BadKeyError):
            key.open(content, sent_by.public)


def test_keys_are_text_and_back() -> None:
    key = CurveKey.make()
    assert (key.seed[:2], len(key.seed), key.public[0], len(key.public)) == ("SX", 58, "X", 56)
    again = CurveKey.from_seed(key.seed)
    assert (again.seed, again.public) == (key.seed, key.public)


@pytest.mark.parametrize("text", ["", "SX", "X" * 56, "é", "SUAM", "SXAA!", PUBLIC, SEED[:-1] + "A"])
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(BadKeyError):
        CurveKey.from_seed(text)


def test_a_user_key_is_no_curve_key() -> None:
    import nkeys

    user = nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER).decode()
    with pytest.raises(BadKeyError):
        CurveKey.from_seed(user)
    with pytest.raises(BadKeyError):
        CurveKey.make().seal(b"", nkeys.from_seed(user.encode()).public_key.decode())
