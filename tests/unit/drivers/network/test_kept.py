"""Records on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcnode.drivers.network.kept import Kept
from vcnode.errors import NetworkError
from vcnode.models.vm import Disk


@pytest.fixture
def kept(tmp_path: Path) -> Kept[Disk]:
    return Kept(tmp_path / "kept", Disk.model_validate_json)


def test_record_is_there_for_the_next_agent(kept: Kept[Disk], tmp_path: Path) -> None:
    assert kept.find("") == {}
    disk = Disk(disk_id="d", path="/x")
    kept.save("a.eth0", disk)
    kept.save("a.eth0", disk.model_copy(update={"path": "/y"}))
    kept.save("b.eth0", disk)
    again = Kept(tmp_path / "kept", Disk.model_validate_json)
    assert again.find("a.") == {"a.eth0": Disk(disk_id="d", path="/y")}
    assert again.names("") == ["a.eth0", "b.eth0"]
    again.remove("a.eth0")
    again.remove("a.eth0")
    assert again.names("") == ["b.eth0"]


def test_damaged_record_is_told(kept: Kept[Disk]) -> None:
    kept.save("a", Disk(disk_id="d", path="/x"))
    kept.path("a").write_text("{}")
    with pytest.raises(NetworkError, match=r"a\.json is damaged"):
        kept.find("a")


def test_record_that_cannot_be_written_leaves_the_earlier_one(kept: Kept[Disk]) -> None:
    kept.save("a", Disk(disk_id="d", path="/x"))
    kept.path("a").with_suffix(".new").mkdir()
    with pytest.raises(NetworkError, match="cannot be written"):
        kept.save("a", Disk(disk_id="d", path="/y"))
    assert kept.find("")["a"].path == "/x"


def test_what_a_crash_has_left_half_written_goes(kept: Kept[Disk]) -> None:
    kept.tidy()  # where there is nothing at all
    kept.save("a", Disk(disk_id="d", path="/x"))
    kept.path("b").with_suffix(".new").write_text("{")
    kept.tidy()
    assert [path.name for path in kept.path("a").parent.iterdir()] == ["a.json"]
