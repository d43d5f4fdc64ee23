import os
from pathlib import Path

import pytest

from vcnode.drivers.storage import syscalls
from vcnode.drivers.storage.paths import AllowedRoots, lies_in
from vcnode.errors import InvalidArgumentError, NotFoundError


@pytest.mark.parametrize(
    ("path", "directory", "expected"),
    [
        ("/srv", "/srv", True),
        ("/srv/a", "/srv", True),
        ("/srvx", "/srv", False),
        ("/", "/srv", False),
        ("/srv/a", "/", True),
    ],
)
def test_lies_in_compares_whole_components(path, directory, expected):
    assert lies_in(path, directory) is expected


def test_directory_below_a_root_is_opened(host):
    fd = host.allowed.open_directory(str(host.roots / "app"))
    try:
        assert os.path.samestat(os.fstat(fd), os.stat(host.roots / "app"))
    finally:
        os.close(fd)


def test_the_root_itself_may_be_named(host):
    host.allowed.check_directory(str(host.roots))


def test_link_inside_the_roots_is_followed(host):
    (host.roots / "link").symlink_to("app/bin")
    host.allowed.check_directory(str(host.roots / "link"))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "app",
        "{roots}/../precious",
        "{roots}/app/../app",
        "{precious}",
        "/",
        "{roots}x",
        "//etc",
        "{roots}/a\0b",
    ],
)
def test_path_outside_the_roots_by_name_is_refused(host, path):
    with pytest.raises(InvalidArgumentError):
        host.allowed.check_directory(path.format(roots=host.roots, precious=host.precious))


def test_refusal_does_not_tell_whether_the_path_exists(host):
    messages = []
    for name in ("keep", "nothing"):
        with pytest.raises(InvalidArgumentError) as caught:
            host.allowed.check_directory(str(host.precious / name))
        messages.append(caught.value.message.replace(name, "X"))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("target", ["{precious}", "../precious", "/etc"])
def test_link_out_of_the_roots_is_refused(host, target):
    (host.roots / "link").symlink_to(target.format(precious=host.precious))
    with pytest.raises(InvalidArgumentError, match="outside"):
        host.allowed.check_directory(str(host.roots / "link"))


def test_link_as_a_middle_component_is_refused(host):
    (host.roots / "link").symlink_to(host.top)
    with pytest.raises(InvalidArgumentError, match="outside"):
        host.allowed.check_directory(str(host.roots / "link" / "precious"))


def test_links_in_a_circle_are_refused(host):
    (host.roots / "a").symlink_to("b")
    (host.roots / "b").symlink_to("a")
    with pytest.raises(InvalidArgumentError):
        host.allowed.check_directory(str(host.roots / "a"))


def test_missing_path_is_not_found(host):
    with pytest.raises(NotFoundError):
        host.allowed.check_directory(str(host.roots / "nothing"))


def test_file_is_not_a_directory(host):
    with pytest.raises(InvalidArgumentError, match="not a directory"):
        host.allowed.check_directory(str(host.roots / "plain"))


def test_plain_file_is_opened_for_reading(host):
    with open(host.allowed.open_file(str(host.roots / "plain"))) as file:
        assert file.read() == "a file"


def test_only_plain_files_are_opened_and_no_device_or_fifo_is_waited_for(host):
    os.mkfifo(host.roots / "fifo")
    for name in ("app", "fifo"):
        with pytest.raises(InvalidArgumentError, match="no plain file"):
            host.allowed.open_file(str(host.roots / name))


def test_path_through_a_file_is_refused(host):
    with pytest.raises(InvalidArgumentError, match="leads through"):
        host.allowed.check_directory(str(host.roots / "plain" / "x"))


def test_name_longer_than_the_kernel_takes_is_refused(host):
    with pytest.raises(InvalidArgumentError, match="too long"):
        host.allowed.check_directory(str(host.roots / ("x" * 300)))


def test_component_swapped_for_a_link_after_the_look_is_not_followed(host, monkeypatch):
    """The attack: a local user, or a guest that has a share, swaps between resolving and opening."""
    victim = host.roots / "app"
    real_open = syscalls.openat2

    def swapped(*args, **kwargs):
        victim.rename(host.roots / "away")
        victim.symlink_to(host.precious)
        return real_open(*args, **kwargs)

    monkeypatch.setattr(syscalls, "openat2", swapped)
    with pytest.raises(InvalidArgumentError, match="changed"):
        host.allowed.check_directory(str(victim / "bin"))


def test_opening_loses_no_descriptor(host):
    before = len(os.listdir("/proc/self/fd"))
    for path in ("app", "plain", "nothing", "plain/x"):
        with pytest.raises((InvalidArgumentError, NotFoundError)):
            host.allowed.check_directory(str(host.roots / path / "no"))
    host.allowed.check_directory(str(host.roots / "app"))
    assert len(os.listdir("/proc/self/fd")) == before


class TestOwnDirectories:
    def test_state_directory_is_refused(self, tmp_path: Path):
        (tmp_path / "state" / "images").mkdir(parents=True)
        allowed = AllowedRoots([tmp_path], [tmp_path / "state"])
        for path in (tmp_path, tmp_path / "state", tmp_path / "state" / "images"):
            with pytest.raises(InvalidArgumentError, match="vcnode itself"):
                allowed.check_directory(str(path))

    def test_root_inside_the_state_directory_is_usable(self, tmp_path: Path):
        (tmp_path / "state" / "roots" / "app").mkdir(parents=True)
        allowed = AllowedRoots([tmp_path / "state" / "roots"], [tmp_path / "state"])
        allowed.check_directory(str(tmp_path / "state" / "roots" / "app"))

    def test_root_that_is_a_link_is_usable(self, tmp_path: Path):
        (tmp_path / "real" / "app").mkdir(parents=True)
        (tmp_path / "link").symlink_to("real")
        allowed = AllowedRoots([tmp_path / "link"], [])
        allowed.check_directory(str(tmp_path / "link" / "app"))
        allowed.check_directory(str(tmp_path / "real" / "app"))

    def test_root_that_does_not_exist_allows_nothing(self, tmp_path: Path):
        allowed = AllowedRoots([tmp_path / "absent"], [])
        with pytest.raises(NotFoundError):
            allowed.check_directory(str(tmp_path / "absent" / "app"))
