import os
import resource
import subprocess

import pytest

from vcnode.drivers.storage import trees


def remove(path):
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        trees.remove_tree(fd, path.name)
    finally:
        os.close(fd)


def test_tree_with_everything_in_it_is_removed(host):
    tree = host.top / "tree"
    (tree / "a" / "b" / "c").mkdir(parents=True)
    (tree / "a" / "file").write_text("x")
    (tree / "a" / "b" / "same").write_text("x")
    (tree / "same").mkdir()
    os.mkfifo(tree / "a" / "fifo")
    (tree / "a" / "b" / "link").symlink_to(host.precious)
    (tree / "out").symlink_to(host.precious / "keep")
    os.link(host.precious / "keep", tree / "hard")
    remove(tree)
    assert not tree.exists()


def test_absent_tree_is_no_error(host):
    remove(host.top / "nothing")


def test_link_in_place_of_the_tree_is_refused(host):
    (host.top / "tree").symlink_to(host.precious)
    with pytest.raises(OSError, match=r"Too many levels|Not a directory"):
        remove(host.top / "tree")
    assert (host.precious / "keep").exists()


def test_name_cannot_lead_upwards(host):
    with pytest.raises(OSError, match="cross-device"):
        remove(host.roots / "..")
    assert (host.precious / "keep").exists()


def test_tree_deeper_than_any_path_is_removed_with_few_descriptors(host):
    fd = os.open(host.top, os.O_RDONLY)
    for name in ["tree"] + ["d" * 100] * 200:
        os.mkdir(name, dir_fd=fd)
        deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, hard))
    try:
        remove(host.top / "tree")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not (host.top / "tree").exists()


@pytest.mark.root
@pytest.mark.parametrize("depth", ["m", "a/m", "a/b/m"])
def test_mounted_directory_of_the_same_filesystem_is_never_entered(host, depth):
    """A bind mount of the same filesystem has the same st_dev: comparing that would not help."""
    tree = host.top / "tree"
    (tree / depth).mkdir(parents=True)
    subprocess.run(["mount", "--bind", host.precious, tree / depth], check=True)
    try:
        with pytest.raises(OSError, match=r"busy|cross-device"):
            remove(tree)
        assert (host.precious / "keep").read_text() == "precious"
        trees.unmount_below(str(tree))
    finally:
        subprocess.run(["umount", "-q", tree / depth], check=False)
    remove(tree)
    assert not tree.exists()


@pytest.mark.root
def test_mounted_file_is_not_deleted(host):
    tree = host.top / "tree"
    tree.mkdir()
    (tree / "f").touch()
    subprocess.run(["mount", "--bind", host.precious / "keep", tree / "f"], check=True)
    with pytest.raises(OSError, match="busy"):
        remove(tree)
    trees.unmount_below(str(tree))
    remove(tree)


@pytest.mark.root
def test_unmounting_takes_stacked_and_nested_and_busy_mounts(host):
    tree = host.top / "tree"
    (tree / "a b\\c").mkdir(parents=True)
    (host.precious / "inner").mkdir()
    target = tree / "a b\\c"
    for source, where in ((host.precious, target), (host.roots, target / "inner"), (host.precious, target)):
        subprocess.run(["mount", "--bind", source, where], check=True)
    with open(target / "keep"):
        trees.unmount_below(str(tree))
    assert host.mounts() == []
    remove(tree)
    (host.precious / "inner").rmdir()


def test_mount_points_are_unescaped_and_bounded_by_components():
    text = "\n".join(
        f"1 2 0:1 / {point} rw - tmpfs none rw"
        for point in ("/run/v/a", "/run/v/a/x\\040y", "/run/v/ab", "/run", "/run/v/a/z\\134")
    )
    assert trees.mount_points(text, "/run/v/a") == ["/run/v/a", "/run/v/a/x y", "/run/v/a/z\\"]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (["/v/shared", "/v/shared/c"], ["/v/shared/c", "/v/shared"]),
        (["/v/shared", "/v/shared/c", "/v/shared/c/deep"], ["/v/shared/c", "/v/shared"]),
        (["/v/x", "/v/x"], ["/v/x", "/v/x"]),
        ([], []),
    ],
)
def test_only_outermost_mounts_are_touched(points, expected):
    assert trees.outermost(points, "/v/shared") == expected
