"""Why skopeo's signature policy has refused an image, in words for who wants it. Pure.

Source: containers/image, signature/policy_eval*.go and mechanism_gpgme.go, as skopeo 1.9 words them; what is
not known here is quoted.
"""

from __future__ import annotations

import re

MAX_REASONS = 3
"""Reasons that are told of an image with many signatures."""
MAX_QUOTE_CHARS = 200
_REJECTED = re.compile(r"source image rejected(?:: *(?P<words>.*))?", re.I | re.S)
_CUT_OFF = re.compile(r"Invalid GPG signature|signatures? .* accepted", re.I)
"""Of a text so long that only its end was kept."""
_NONE_ACCEPTED = re.compile(r"None of the signatures were accepted, reasons: *", re.I)
_GPG = re.compile(
    r'Invalid GPG signature: .*?Fingerprint:"(?P<key>[0-9A-F]*)".*?Err(?:or)?\{err:0x(?P<code>[0-9a-f]+)\}',
    re.I | re.S,
)
_FILE = re.compile(r"(?:file://)?(?<![\w.:/-])/[^\s\"';,:]+")
"""Files of the node, which are no business of a caller's; names of images have no slash in front."""
_NO_PUBKEY, _BAD_SIGNATURE = 9, 8
"""Source: libgpg-error, err-codes.h; the upper bits say who has found it."""
_KNOWN = (
    (
        re.compile(r"no signature exists \([1-9]", re.I),
        "has no signature of the kind that the node's signature policy demands",
    ),
    (
        re.compile(r"signature was required, but no signature exists", re.I),
        "has no signature, and the node's signature policy demands one",
    ),
    (
        re.compile(r"signature for digest (?P<it>sha256:[0-9a-f]+) does not match", re.I),
        "has a signature that was made for another content ({it}): one of them was altered",
    ),
    (
        re.compile(r"signature for identity (?P<it>\S+) is not accepted", re.I),
        "has a signature that was made for another name ({it})",
    ),
    (
        re.compile(r"running image .* is rejected by policy", re.I | re.S),
        "is refused by the node's signature policy, whatever its signatures",
    ),
    (
        re.compile(r"no public keys imported", re.I),
        "cannot be judged: the keys in the node's signature policy are none",
    ),
    (
        re.compile(r"unrecognized signature format|No data\b", re.I),
        "has a signature that is damaged",
    ),
)


def rejection(text: str) -> str | None:
    """What goes on after the image's name; None when it was not the signature policy that ended skopeo.

    Args:
        text: The end of what skopeo wrote to standard error.
    """
    found = _REJECTED.search(text)
    if found is None and not _CUT_OFF.search(text):
        return None
    words = _unquoted(text if found is None else found["words"] or "")
    several = _NONE_ACCEPTED.search(words)
    parts = words[several.end() :].split("; ") if several else [words]
    reasons = list(dict.fromkeys(_reason(part) for part in parts))
    if found is None and len(reasons) > 1:
        del reasons[0]  # its beginning is missing
    more = len(reasons) - MAX_REASONS
    told = ", and ".join(reasons[:MAX_REASONS])
    return told if more <= 0 else f"{told}, and {more} more"


def _reason(words: str) -> str:
    if gpg := _GPG.search(words):
        return _gpg(gpg["key"], int(gpg["code"], 16) & 0xFFFF)
    for pattern, meaning in _KNOWN:
        if known := pattern.search(words):
            return meaning.format(**known.groupdict())
    plain = " ".join(_FILE.sub("a file of the node", words).split()).rstrip(".")[:MAX_QUOTE_CHARS]
    return f"is refused by the node's signature policy ({plain})" if plain else "has no signature that counts"


def _gpg(key: str, code: int) -> str:
    if code == _NO_PUBKEY:
        return f"has a signature by key {key or 'unknown'}, which is not one of the node's signature policy"
    if code == _BAD_SIGNATURE:
        return f"has a signature by key {key or 'unknown'} that is not valid: it was altered"
    return f"has a signature by key {key or 'unknown'} that does not count (GPG error {code})"


def _unquoted(words: str) -> str:
    """Without the quotes of a log line (logrus, text), which end it."""
    return words.strip().removesuffix('"').replace('\\"', '"').replace("\\n", " ")
