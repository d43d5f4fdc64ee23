"""What skopeo says of signatures (1.9.3, as it came), and what the caller is told."""

from __future__ import annotations

import pytest

from vcnode.drivers.storage.registry import explain
from vcnode.drivers.storage.signatures import MAX_QUOTE_CHARS, rejection
from vcnode.errors import NotFoundError, PermissionDeniedError

KEY = "81E793D4C31F9A4DDB75079A42B72D35F202985B"
DIGEST = "sha256:1ff1f7970def48a3ed84ec5cf2412a8d8bda78ea81a463db6d68a4f89a91ecf1"


def line(words: str) -> str:
    quoted = words.replace('"', '\\"')
    return f'time="2026-11-28T00:43:22Z" level=fatal msg="Source image rejected: {quoted}"'


def gpg(code: int, key: str = KEY) -> str:
    return (
        f'Invalid GPG signature: gpgme.Signature{{Summary:128, Fingerprint:"{key}", '
        f"Status:gpgme.Error{{err:{code:#x}}}, Timestamp:time.Date(2026, time.November, 28, 0, 43, 22, 0, "
        "time.Local), ExpTimestamp:time.Date(1970, time.January, 1, 0, 0, 0, 0, time.Local), "
        "WrongKeyUsage:false, PKATrust:0x0, ChainModel:false, Validity:0, ValidityReason:error(nil), "
        "PubkeyAlgo:1, HashAlgo:10}"
    )


BY_ANOTHER = f"has a signature by key {KEY}, which is not one of the node's signature policy"
NONE = "None of the signatures were accepted, reasons: "


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "A signature was required, but no signature exists",
            "has no signature, and the node's signature policy demands one",
        ),
        (
            "A signature was required, but no signature exists "
            "(2 non-sigstore signatures, 0 sigstore non-signature attachments)",
            "has no signature of the kind that the node's signature policy demands",
        ),
        (gpg(9), BY_ANOTHER),
        (gpg(0x7000009), BY_ANOTHER),
        (gpg(8), f"has a signature by key {KEY} that is not valid: it was altered"),
        (gpg(153), f"has a signature by key {KEY} that does not count (GPG error 153)"),
        (
            f"Signature for digest {DIGEST} does not match",
            f"has a signature that was made for another content ({DIGEST}): one of them was altered",
        ),
        (
            "Signature for identity 127.0.0.1:5000/team/altered:1 is not accepted",
            "has a signature that was made for another name (127.0.0.1:5000/team/altered:1)",
        ),
        (
            "Running image docker://127.0.0.1:5000/team/good:1 is rejected by policy.",
            "is refused by the node's signature policy, whatever its signatures",
        ),
        ("No data", "has a signature that is damaged"),
        (
            'parsing signature "/srv/sigs/x/signature-1": unrecognized signature format, '
            "starting with binary 0x67",
            "has a signature that is damaged",
        ),
        (
            f"{NONE}No public keys imported; No public keys imported",
            "cannot be judged: the keys in the node's signature policy are none",
        ),
        (
            f"{NONE}open /etc/keys/a.gpg: no such file or directory; open /etc/keys/a.gpg: no such file",
            "is refused by the node's signature policy (open a file of the node: no such file or directory), "
            "and is refused by the node's signature policy (open a file of the node: no such file)",
        ),
        (f"{NONE}{gpg(9)}; {gpg(9)}", BY_ANOTHER),
        (
            f"{NONE}{gpg(9)}; Signature for digest {DIGEST} does not match",
            f"{BY_ANOTHER}, and has a signature that was made for another content ({DIGEST}): "
            "one of them was altered",
        ),
        (
            "A new word for registry.example/team/app:1.",
            "is refused by the node's signature policy (A new word for registry.example/team/app:1)",
        ),
        ("", "has no signature that counts"),
    ],
)
def test_what_the_policy_has_against_an_image_is_told(words: str, told: str) -> None:
    assert rejection(line(words)) == told


def test_of_many_reasons_some_are_told_and_none_is_long() -> None:
    keys = [f"{n:040X}" for n in range(6)]
    told = rejection(line(NONE + "; ".join(gpg(9, key) for key in keys)))
    assert told is not None
    assert [key in told for key in keys] == [True] * 3 + [False] * 3
    assert told.endswith(", and 3 more")
    assert len(rejection(line("x" * 5000)) or "") < MAX_QUOTE_CHARS + 60


def test_a_text_whose_beginning_is_lost_is_still_known() -> None:
    text = line(NONE + "; ".join(gpg(9) for _ in range(30)))[-4096:]
    assert "rejected" not in text
    assert rejection(text) == BY_ANOTHER


def test_other_errors_are_not_the_policys() -> None:
    text = 'level=fatal msg="reading manifest 1 in 127.0.0.1/team/app: manifest unknown: manifest unknown"'
    assert rejection(text) is None
    assert isinstance(explain(text, "127.0.0.1/team/app:1"), NotFoundError)


def test_the_error_is_one_sentence_and_names_the_rule() -> None:
    error = explain(line(gpg(9)), "reg.example/app:1")
    assert isinstance(error, PermissionDeniedError)
    assert error.message == f"reference: 'reg.example/app:1' {BY_ANOTHER} (rule images.policy_file)."
    [denial] = error.details["denials"]
    assert denial["message"] == f"'reg.example/app:1' {BY_ANOTHER}"
