"""Guests and disks of somebody else's, small: busybox, and dropbear as their SSH server.

The kernel modules are those of the node's own guest image.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import asyncssh

from vcnode.drivers.hypervisor.qemu import Guest
from vcnode.guest.image import debs, kernel, kernel_packages, modules
from vcnode.guest.image.build import default_cache_dir
from vcnode.guest.image.cpio import CharDevice, Directory, File, Symlink, Tree, pack

_PATH = "/usr/sbin:/usr/bin"
TOOLS = ("dropbear", "crun", "syslinux", "mcopy", "mformat", "qemu-img", "mke2fs")

_INITRAMFS = """\
#!/bin/sh
mkdir -p /proc /sys /new
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for m in $(cat /etc/vcnode/modules /etc/vcnode/modules-ext4); do insmod /usr/lib/modules/$m; done
root=$(tr ' ' '\n' </proc/cmdline | sed -n 's/^root=//p')
while [ ! -e ${root:=/dev/vda} ]; do usleep 20000; done
mount -t ext4 $root /new || exec sh
mount -o move /dev /new/dev
exec switch_root /new /sbin/init
"""
"""Loads modules, then goes over to the disk; a shell on the console if it cannot."""

_INIT = """\
#!/bin/sh
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /dev/pts
mount -t devpts none /dev/pts
hostname own
ip link set lo up
# <client>::<gateway>:<netmask>:<hostname>:<device>, as a kernel parameter or from the disk with the seed
for p in $(cat /proc/cmdline) $(seed); do
    case $p in ip=*)
        IFS=: read -r client _ gateway netmask hostname device _ <<END
${p#ip=}
END
        ip link set $device up
        ip addr add $client/$netmask dev $device
        ip route add default via $gateway
        hostname $hostname ;;
    esac
done
echo $(( $(cat /etc/boots 2>/dev/null || echo 0) + 1 )) >/etc/boots
sync
echo "boot $(cat /etc/boots) of $(hostname)"
[ -e /etc/dropbear/key ] || dropbearkey -t ed25519 -f /etc/dropbear/key >/dev/null 2>&1
trap "sync; poweroff -f" USR2 # how poweroff of busybox tells process 1
dropbear -F -E -r /etc/dropbear/key -p 22 &
while true; do wait; done
"""


_HELLO = """\
#!/bin/sh
mkdir -p /proc /sys
mount -t proc none /proc
mount -t sysfs none /sys
for m in $(cat /etc/modules); do insmod /usr/lib/modules/$m; done
echo "this is $(uname -m) with $(nproc) CPUs"
cat /proc/cmdline
for d in /sys/bus/virtio/devices/*; do echo "virtio $(basename $(readlink $d/driver))"; done
poweroff -f
"""
"""Says what it is and has, and ends."""
AARCH64 = Path(os.environ.get("VCNODE_TEST_AARCH64", ".cache/aarch64"))
"""Where dev/aarch64 puts packages for the architecture."""


def aarch64_guest(directory: Path) -> Guest:
    """A kernel of Debian for aarch64, and an initramfs that says what it finds."""
    [kernel_deb], [busybox_deb] = AARCH64.glob("linux-image-*.deb"), AARCH64.glob("busybox-static_*.deb")
    image, builtin, loadable = b"", "", {}
    for path, content in debs.members(kernel_deb, kernel_packages._wanted):
        if isinstance(content, bytes):
            if path.startswith("/boot/vmlinuz-"):
                image = content
            elif path.endswith("/modules.builtin"):
                builtin = content.decode()
            else:
                loadable[path] = content
    wanted = ("virtio_pci", "virtio_console", "virtio_scsi", "virtio_net", "virtio_blk", "9pnet_virtio")
    chosen = modules.select(loadable, modules.builtin_modules(builtin), wanted)
    [busybox] = (c for p, c in debs.members(busybox_deb, lambda path: path == "/usr/bin/busybox"))
    assert isinstance(busybox, bytes)
    tree = _applets(
        busybox, "sh", "mount", "insmod", "cat", "mkdir", "uname", "nproc", "basename", "readlink", "poweroff"
    )
    for module in chosen:
        tree.add(f"/usr/lib/modules/{module.name}.ko", File(module.content))
    tree.add("/etc/modules", File("".join(f"{module.name}.ko\n" for module in chosen).encode()))
    tree.add("/init", File(_HELLO.encode(), 0o755))
    guest = Guest(directory / "Image", directory / "initrd")
    guest.kernel.write_bytes(kernel.bootable(image, "aarch64"))
    guest.initrd.write_bytes(pack(tree))
    return guest


def initramfs(guest_image: Path) -> bytes:
    """Goes over to the disk that ``root=`` names, else to the whole first one."""
    tree = _busybox("sh", "mount", "insmod", "cat", "sed", "tr", "switch_root", "usleep", "mkdir")
    for path, content in _read(guest_image / "initrd").items():
        if path.startswith(("/usr/lib/modules/", "/etc/vcnode/modules")):
            tree.add(path, File(content))
    tree.add("/init", File(_INITRAMFS.encode(), 0o755))
    return pack(tree)


def root(directory: Path, trusted: asyncssh.SSHKey) -> Path:
    """A directory with the root of a guest that lets the holder of *trusted* in as root."""
    words = (
        "sh mount cat ip hostname sync poweroff mkdir mkfifo id uname grep sleep rm mv setsid echo kill head"
    )
    words += " nproc df true stty printf dd tr sed date su"
    tree = _busybox(*words.split())
    programs = [shutil.which(name, path=_PATH) or name for name in ("dropbear", "dropbearkey", "crun")]
    for path in {*programs, *(library for program in programs for library in _libraries(program))}:
        tree.add(path, File(Path(path).read_bytes(), 0o755))
    tree.add("/bin/crun", Symlink(programs[2])) if programs[2] != "/bin/crun" else None
    for name in ("dropbear", "dropbearkey"):
        tree.add(f"/bin/{name}", Symlink(shutil.which(name, path=_PATH) or ""))
    tree.add("/bin/seed", File(b"#!/bin/sh\n", 0o755))
    tree.add("/sbin/init", File(_INIT.encode(), 0o755))
    tree.add("/etc/passwd", File(b"root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n"))
    tree.add("/etc/group", File(b"root:x:0:\nweb:x:1000:\n"))
    tree.add("/etc/shells", File(b"/bin/sh\n"))
    tree.add("/root/.ssh/authorized_keys", File(trusted.export_public_key(), 0o600))
    for path in ("/dev", "/proc", "/sys", "/tmp", "/etc/dropbear", "/var/run", "/run"):
        tree.add(f"{path}/.keep", File(b""))
    made = directory / "root"
    _unpack(tree, made)
    (made / "root").chmod(0o700)
    (made / "root/.ssh").chmod(0o700)
    return made


def ext4_disk(root: Path, disk: Path, *, size_mib: int = 48) -> Path:
    """A raw disk image that is an ext4 file system."""
    size = f"{size_mib}M"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, disk, size], check=True, timeout=60)
    return disk


def bootable_disk(guest_image: Path, root: Path, disk: Path, *, append: str) -> Path:
    """A qcow2 image as distributions make them: partitions, a boot loader that speaks on the serial port, a
    root file system, and a kernel that the node does not know."""
    raw = disk.with_suffix(".raw")
    boot_mib, root_mib = 24, 48
    with raw.open("wb") as file:
        file.truncate((1 + boot_mib + root_mib) << 20)
    loader = Path("/usr/lib/SYSLINUX/mbr.bin").read_bytes().ljust(446, b"\0")
    first = _partition(1, boot_mib, kind=0x0C, active=True)
    second = _partition(1 + boot_mib, root_mib, kind=0x83)
    with raw.open("r+b") as file:
        file.write(loader + first + second + bytes(32) + b"\x55\xaa")
    fat = f"{raw}@@1M"
    subprocess.run(
        ["mformat", "-i", fat, "-T", str(boot_mib * 2048), "-h", "16", "-s", "63", "::"], check=True
    )
    config = f"SERIAL 0\nDEFAULT l\nLABEL l\nKERNEL vmlinuz\nINITRD initrd\nAPPEND {append}\n"
    for name, content in (
        ("vmlinuz", packaged_kernel()),
        ("initrd", initramfs(guest_image)),
        ("syslinux.cfg", config.encode()),
    ):
        subprocess.run(["mcopy", "-i", fat, "-", f"::{name}"], input=content, check=True, timeout=30)
    subprocess.run(["syslinux", "--install", "--offset", str(1 << 20), raw], check=True, timeout=30)
    part = ext4_disk(root, raw.with_suffix(".part"), size_mib=root_mib - 1)
    at = (1 + boot_mib) << 20
    with raw.open("r+b") as file, part.open("rb") as source:
        file.seek(at)
        shutil.copyfileobj(source, file)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, disk], check=True, timeout=60)
    raw.unlink()
    part.unlink()
    return disk


def packaged_kernel() -> bytes:
    """The bzImage out of the kernel package that the guest image is made of."""
    [deb] = default_cache_dir().glob("linux-image-[0-9]*.deb")
    for _, content in debs.members(deb, lambda path: path.startswith("/boot/vmlinuz-")):
        assert isinstance(content, bytes)
        return content
    raise AssertionError(f"{deb} holds no kernel")


def _busybox(*applets: str) -> Tree:
    return _applets(Path("/bin/busybox").read_bytes(), *applets)


def _applets(busybox: bytes, *applets: str) -> Tree:
    tree = Tree()
    tree.add("/bin/busybox", File(busybox, 0o755))
    for applet in applets:
        tree.add(f"/bin/{applet}", Symlink("busybox"))
    tree.add("/dev/console", CharDevice(5, 1))
    tree.add("/dev/null", CharDevice(1, 3, 0o666))
    return tree


def _libraries(program: str) -> set[str]:
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=30).stdout
    return set(re.findall(r"(/\S+) \(0x", listed))


def _unpack(tree: Tree, directory: Path) -> None:
    for path, entry in tree.entries().items():
        at = directory / path.removeprefix("/")
        match entry:
            case Directory():
                at.mkdir(parents=True)
            case File(content, mode):
                at.write_bytes(content)
                at.chmod(mode)
            case Symlink(target):
                at.symlink_to(target)
            case _:
                continue  # devices: the kernel makes them


def _partition(start_mib: int, size_mib: int, *, kind: int, active: bool = False) -> bytes:
    """An entry of an MBR: addresses by sector; those by cylinder are out of range, which says so."""
    flags = 0x80 if active else 0
    return struct.pack(
        "<B3sB3sII", flags, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start_mib * 2048, size_mib * 2048
    )


def _read(archive: Path) -> dict[str, bytes]:
    """The plain files of an initramfs as we make them. Source: as of `vcnode.guest.image.cpio`."""
    data, at, files = archive.read_bytes(), 0, {}
    while data[at : at + 6] == b"070701":
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        start = at + (110 + name_size + 3) // 4 * 4
        if mode & 0o170000 == 0o100000:
            files[f"/{name}"] = data[start : start + size]
        at = start + (size + 3) // 4 * 4
    return files
