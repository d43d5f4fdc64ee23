import errno
import os
import stat
import subprocess

import pytest

from vcnode.drivers.storage import syscalls, vmdirs
from vcnode.drivers.storage.threads import unwind
from vcnode.drivers.storage.vmdirs import VmDirs
from vcnode.errors import AlreadyExistsError, InvalidArgumentError, StorageError

pytestmark = pytest.mark.root
VM = "vm-0123456789ab"


@pytest.fixture
def dirs(host):
    made = VmDirs(host.run, host.allowed)
    yield made
    for vm_id in made.ids():
        made.remove(vm_id)


@pytest.fixture
def shared(dirs):
    return dirs.make([], VM) / "shared"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "-x", ".x", "a\0", "a b", "x" * 129, "ä"])
def test_odd_names_are_refused_everywhere(dirs, host, name):
    app = str(host.roots / "app")
    for call in (
        lambda: dirs.make([], name),
        lambda: dirs.remove(name),
        lambda: dirs.share([], VM, name, app),
        lambda: dirs.share([], name, "c", app),
        lambda: dirs.unshare(VM, name),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


def test_directory_is_for_root_alone(dirs, shared):
    assert stat.S_IMODE(shared.parent.stat().st_mode) == 0o700
    assert list(shared.iterdir()) == []
    assert dirs.ids() == [VM]


def test_directory_that_is_there_is_not_taken_over(dirs, shared):
    undo = []
    with pytest.raises(AlreadyExistsError):
        dirs.make(undo, VM)
    assert undo == [], "the undo would remove what belongs to somebody else"


def test_nothing_can_be_written_beside_the_shares(dirs, shared, host):
    """QEMU serves this directory to a hostile guest, and as root."""
    dirs.share([], VM, "c1", str(host.roots / "app"))
    for attack in (
        lambda: (shared / "file").write_text("x"),
        lambda: (shared / "dir").mkdir(),
        lambda: (shared / "c1").rename(shared / "c2"),
        lambda: (shared / "c1").rmdir(),
        lambda: os.mknod(shared / "disk", stat.S_IFBLK | 0o666, os.makedev(254, 0)),
        lambda: os.chmod(shared, 0o777),
    ):
        with pytest.raises(OSError, match=r"Read-only|busy|cross-device"):
            attack()


def test_share_shows_the_host_directory_both_ways(dirs, shared, host):
    dirs.share([], VM, "c1", str(host.roots / "app"))
    assert (shared / "c1" / "bin" / "sh").read_text() == "#!"
    (shared / "c1" / "new").write_text("from the guest")
    assert (host.roots / "app" / "new").read_text() == "from the guest"


def test_setuid_bits_stay_visible_but_have_no_effect_on_the_host(dirs, shared, host):
    os.chmod(host.roots / "app" / "bin" / "sh", 0o4755)
    dirs.share([], VM, "c1", str(host.roots / "app"))
    assert stat.S_IMODE((shared / "c1" / "bin" / "sh").stat().st_mode) == 0o4755
    options = next(line for line in host.mounts() if "/shared/c1 " in line).split(" ")[5].split(",")
    assert {"nosuid", "nodev", "noexec", "nosymfollow"} <= set(options)


def test_links_in_a_share_are_read_but_not_followed_by_the_host(dirs, shared, host):
    (host.roots / "app" / "link").symlink_to(host.precious / "keep")
    dirs.share([], VM, "c1", str(host.roots / "app"))
    assert os.readlink(shared / "c1" / "link") == str(host.precious / "keep")
    with pytest.raises(OSError, match="symbolic links"):
        (shared / "c1" / "link").read_text()


def test_what_is_mounted_below_a_shared_directory_stays_invisible(dirs, shared, host):
    (host.roots / "app" / "data").mkdir()
    subprocess.run(["mount", "--bind", host.precious, host.roots / "app" / "data"], check=True)
    try:
        dirs.share([], VM, "c1", str(host.roots / "app"))
        assert list((shared / "c1" / "data").iterdir()) == []
    finally:
        subprocess.run(["umount", host.roots / "app" / "data"], check=True)


def test_mounts_do_not_spread(dirs, shared, host):
    dirs.share([], VM, "c1", str(host.roots / "app"))
    for line in host.mounts():
        assert "shared:" not in line
        assert "master:" not in line


def test_taken_name_is_refused_and_stays(dirs, shared, host):
    dirs.share([], VM, "c1", str(host.roots / "app"))
    undo = []
    with pytest.raises(AlreadyExistsError):
        dirs.share(undo, VM, "c1", str(host.roots / "app" / "bin"))
    assert undo == []
    assert (shared / "c1" / "bin").is_dir()


def test_mount_point_left_by_an_interrupted_share_is_used_again(dirs, shared, host):
    fd = os.open(shared, os.O_PATH | os.O_DIRECTORY)
    vmdirs._make_directory(fd, "c1")
    os.close(fd)
    dirs.share([], VM, "c1", str(host.roots / "app"))
    assert (shared / "c1" / "bin").is_dir()


def test_share_of_an_absent_vm_is_an_error(dirs, host):
    with pytest.raises(StorageError, match="no directory"):
        dirs.share([], VM, "c1", str(host.roots / "app"))


def test_unshare_removes_the_mount_point(dirs, shared, host):
    dirs.share([], VM, "c1", str(host.roots / "app"))
    dirs.share([], VM, "c2", str(host.roots / "app"))
    dirs.unshare(VM, "c1")
    assert os.listdir(shared) == ["c2"]
    assert (host.roots / "app" / "bin" / "sh").exists()


def test_unshare_of_what_is_absent_succeeds(dirs, shared):
    dirs.unshare(VM, "c1")
    dirs.unshare("vm-other", "c1")


def test_unshare_while_a_file_is_open_succeeds(dirs, shared, host):
    dirs.share([], VM, "c1", str(host.roots / "app"))
    with open(shared / "c1" / "bin" / "sh") as file:
        dirs.unshare(VM, "c1")
        assert os.listdir(shared) == []
        assert file.read() == "#!"


def test_remove_takes_everything_and_leaves_the_users_files(dirs, shared, host):
    for number in range(5):
        dirs.share([], VM, f"c{number}", str(host.roots / "app"))
    (shared.parent / "console.log").write_text("hello")
    (shared.parent / "deep" / "er").mkdir(parents=True)
    dirs.remove(VM)
    assert dirs.ids() == []
    assert host.mounts() == []
    assert (host.roots / "app" / "bin" / "sh").exists()
    dirs.remove(VM)


def test_remove_of_a_busy_directory_succeeds(dirs, shared, host):
    dirs.share([], VM, "c1", str(host.roots / "app"))
    with open(shared / "c1" / "bin" / "sh"):
        dirs.remove(VM)
        assert host.mounts() == []
    assert (host.roots / "app" / "bin" / "sh").exists()


def test_remove_that_cannot_unmount_deletes_nothing_that_is_shared(dirs, shared, host, monkeypatch):
    """The last line of defence: unmounting claims success but did nothing."""
    dirs.share([], VM, "c1", str(host.roots / "app"))
    with monkeypatch.context() as patch:
        patch.setattr(vmdirs, "unmount_below", lambda *_, **__: None)
        with pytest.raises(OSError, match=r"busy|cross-device"):
            dirs.remove(VM)
    assert (host.roots / "app" / "bin" / "sh").read_text() == "#!"
    dirs.remove(VM)


def test_remove_after_a_reboot_that_took_the_mounts(dirs, shared, host):
    subprocess.run(["umount", shared], check=True)
    dirs.remove(VM)
    assert dirs.ids() == []


@pytest.mark.parametrize("step", ["new_tmpfs", "attach_mount"])
def test_failed_make_is_undone_completely(dirs, host, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(errno.ENOMEM, "no")

    undo = []
    with monkeypatch.context() as patch:
        patch.setattr(syscalls, step, fail)
        with pytest.raises(OSError, match="no"):
            dirs.make(undo, VM)
    unwind(undo)
    assert dirs.ids() == []


@pytest.mark.parametrize("step", ["clone_mount", "set_mount_attributes", "attach_mount"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_failed_share_is_undone_completely(dirs, shared, host, monkeypatch, step, call):
    real, calls = getattr(syscalls, step), []
    before = len(os.listdir("/proc/self/fd"))

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOMEM, "no")
        return real(*args, **kwargs)

    undo = []
    with monkeypatch.context() as patch:
        patch.setattr(syscalls, step, fail)
        try:
            dirs.share(undo, VM, "c1", str(host.roots / "app"))
        except OSError:
            pass
        else:
            assert len(calls) < call, "the fault was swallowed"
    unwind(undo)
    assert os.listdir(shared) == []
    assert len(os.listdir("/proc/self/fd")) == before
    dirs.share([], VM, "c1", str(host.roots / "app"))
