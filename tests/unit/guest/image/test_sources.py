from __future__ import annotations

import pytest

import vcnode
from vcnode.guest.image import sources
from vcnode.guest.image.errors import GuestImageError


def test_the_installed_agent_is_complete_and_has_nothing_of_the_host() -> None:
    found = sources.agent_sources()
    assert {"vcnode/__init__.py", "vcnode/guest/__init__.py", "vcnode/guest/protocol.py"} <= found.keys()
    assert "vcnode/guest/agent/init.py" in found
    assert not [path for path in found if "/image/" in path or path.startswith("vcnode/models")]


def test_version_is_that_of_the_package() -> None:
    assert sources.agent_version(sources.agent_sources()) == vcnode.__version__


@pytest.mark.parametrize("content", [b"", b"__version__ = 1", b"def (", b"\0"])
def test_sources_without_a_version_are_refused(content: bytes) -> None:
    with pytest.raises(GuestImageError, match=r"vcnode/__init__\.py"):
        sources.agent_version({"vcnode/__init__.py": content})


def test_digest_covers_names_and_contents() -> None:
    digests = [sources.sources_digest(given) for given in ({"a": b"1"}, {"a": b"2"}, {"b": b"1"}, {})]
    assert len(set(digests)) == 4
