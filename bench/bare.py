"""The floor: the smallest script that does the same physical work with QEMU, by raw sockets.

Nothing of vcnode is used here. The guest runs the same kernel and modules with ``bare_guest.py`` as init, or
a few lines of shell where only the boot counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.options import Options

QEMU = "qemu-system-x86_64"
KERNEL_PARAMS = "console=ttyS0 quiet initcall_blacklist=tracer_init_tracefs panic=-1 reboot=t"
"""As the product's, for the floor to be as low as it can be."""


def _cpio_entry(name: str, mode: int, data: bytes, ino: int) -> bytes:
    """One entry of a newc archive. Source: cpio(5)."""
    raw = name.encode() + b"\0"
    fields = (ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08x" % f for f in fields) + raw
    head += b"\0" * (-len(head) % 4)
    return head + data + b"\0" * (-len(data) % 4)


def _entries(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and raw entries of a newc archive, without its end. Source: cpio(5)."""
    at = 0
    while True:
        name_size = int(archive[at + 94 : at + 102], 16)
        data_at = (at + 110 + name_size + 3) & ~3
        end = (data_at + int(archive[at + 54 : at + 62], 16) + 3) & ~3
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        if name == "TRAILER!!!":
            return
        yield name, archive[at:end]
        at = end


def bare_initrd(
    initrd: Path, init: bytes, out: Path, *, keep: Callable[[str], bool] = lambda name: True
) -> None:
    """Write *out*: what *keep* wants of the image's initrd, with another ``/init``."""
    kept = [raw for name, raw in _entries(initrd.read_bytes()) if name != "init" and keep(name)]
    end = _cpio_entry("TRAILER!!!", 0, b"", 0)
    out.write_bytes(b"".join([*kept, _cpio_entry("init", 0o100755, init, 1 << 20), end]))


SHELL_INIT = b"""#!/bin/busybox sh
busybox mount -t devtmpfs devtmpfs /dev
while read -r module; do busybox insmod /lib/modules/$module; done </etc/vcnode/modules
until [ -c /dev/vport0p1 ]; do :; done
echo -n x >/dev/vport0p1
busybox sleep 1000000
"""


def shell_needs(name: str) -> bool:
    """Whether the shell init needs this file of the image: no Python, no libraries."""
    wanted = ("usr/lib/modules", "etc/", "usr/bin/busybox", "dev/console")
    return name.startswith(wanted) or (name.count("/") < 2 and not name.startswith("usr/lib/"))


class BareVm:
    """One QEMU, driven by raw sockets."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self.process = process
        self.directory = directory
        self._qmp: socket.socket | None = None
        self._qmp_in = b""
        self._port: socket.socket | None = None
        self._port_in = b""

    @staticmethod
    def _connect(path: Path, deadline: float) -> socket.socket:
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(path))
            except OSError:
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.0005)
            else:
                sock.settimeout(60)
                return sock

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run one QMP command, connecting first if need be."""
        if self._qmp is None:
            self._qmp = self._connect(self.directory / "qmp", time.monotonic() + 10)
            self._qmp_reply("QMP")
            self.qmp("qmp_capabilities")
        body: dict[str, Any] = {"execute": command}
        if arguments:
            body["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self._qmp.sendall(json.dumps(body).encode() + b"\n")
        return self._qmp_reply("return")

    def _qmp_reply(self, key: str) -> Any:
        assert self._qmp is not None
        while True:
            while b"\n" not in self._qmp_in:
                chunk = self._qmp.recv(65536)
                if not chunk:
                    raise RuntimeError(f"QEMU hung up: {(self.directory / 'err').read_text()}")
                self._qmp_in += chunk
            line, self._qmp_in = self._qmp_in.split(b"\n", 1)
            message = json.loads(line)
            if "error" in message:
                raise RuntimeError(str(message["error"]))
            if key in message:
                return message[key]

    def open_port(self) -> None:
        """Connect to the guest's serial port."""
        self._port = self._connect(self.directory / "agent", time.monotonic() + 10)

    def close_port(self) -> None:
        """Hang up."""
        if self._port is not None:
            self._port.close()
            self._port = None

    def exchange(self, greeting: bytes, until: bytes) -> None:
        """Write *greeting* and read up to *until*."""
        assert self._port is not None
        self._port.sendall(greeting)
        found = b""
        while until not in found:
            chunk = self._port.recv(65536)
            if not chunk:
                raise RuntimeError("the guest's port was closed")
            found += chunk

    def read_line(self) -> dict[str, Any]:
        """The guest's next line."""
        assert self._port is not None
        while b"\n" not in self._port_in:
            chunk = self._port.recv(65536)
            if not chunk:
                raise RuntimeError("the guest's port was closed")
            self._port_in += chunk
        line, self._port_in = self._port_in.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request to the guest."""
        assert self._port is not None
        self._port.sendall(json.dumps(request).encode() + b"\n")
        return self.read_line()

    def receive(self, size: int) -> None:
        """Have the guest write so many bytes, and read them."""
        assert self._port is not None
        self.ask(do="write", size=size)
        size -= len(self._port_in)
        self._port_in = b""
        space = bytearray(256 * 1024)
        while size:
            size -= self._port.recv_into(space, min(size, len(space)))
        self.read_line()

    def send(self, block: bytes, size: int) -> None:
        """Have the guest read so many bytes, and write them; *size* is a multiple of the block's."""
        assert self._port is not None
        self.ask(do="read", size=size)
        for _ in range(size // len(block)):
            self._port.sendall(block)
        self.read_line()

    def plug(self, path: Path, serial: str) -> None:
        """Hot-plug a read-only disk."""
        self.qmp(
            "blockdev-add",
            driver="raw",
            node_name="d0",
            read_only=True,
            file={"driver": "file", "filename": str(path)},
        )
        self.qmp(
            "device_add",
            driver="scsi-hd",
            id="disk0",
            bus="scsi0.0",
            drive="d0",
            serial=serial,
            scsi_id=1,
            lun=1,
        )

    def kill(self) -> None:
        """End it and remove its directory."""
        for sock in (self._qmp, self._port):
            if sock is not None:
                sock.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class Floor:
    """Bare QEMUs of one guest image."""

    def __init__(
        self,
        guest_dir: Path,
        work: Path,
        *,
        mem_size_mib: int = 256,
        accel: str = "tcg",
        kernel_params: str = "",
    ) -> None:
        self.kernel = guest_dir / "vmlinux"
        self.work = work
        self.mem_size_mib = mem_size_mib
        self.accel = accel
        self.kernel_params = kernel_params
        """Besides the fixed ones; a busy host without KVM needs ``tsc_early_khz`` to boot at all."""
        self.initrd = work / "bare-initrd"
        bare_initrd(guest_dir / "initrd", Path(__file__).with_name("bare_guest.py").read_bytes(), self.initrd)
        self.full_initrd = guest_dir / "initrd"
        self.shell_initrd = work / "shell-initrd"
        bare_initrd(self.full_initrd, SHELL_INIT, self.shell_initrd, keep=shell_needs)
        self.template = work / "template"
        self.spawned: list[BareVm] = []
        """All that were started, ended ones as well."""

    def _spawn(
        self,
        ram: Path | None,
        *,
        share: bool = False,
        incoming: bool = False,
        fds: tuple[int, ...] = (),
        initrd: Path | None = None,
    ) -> BareVm:
        directory = Path(tempfile.mkdtemp(dir=self.work, prefix="b"))
        (directory / "shared").mkdir()
        size = f"{self.mem_size_mib}M"
        cpu = "host" if self.accel == "kvm" else "max,-erms"  # as the product's: without it, both are slower
        backend = f"memory-backend-ram,id=ram,size={size}"
        if ram is not None:
            mapping = f"mem-path={ram},share={'on' if share else 'off'}"
            backend = f"memory-backend-file,id=ram,size={size},{mapping}"
        argv = [
            QEMU, "-M", f"microvm,accel={self.accel},memory-backend=ram",
            "-cpu", cpu, "-m", size, "-smp", "1", "-object", backend,
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{directory}/console",
            "-kernel", str(self.kernel), "-initrd", str(initrd or self.initrd),
            "-append", f"{KERNEL_PARAMS} {self.kernel_params}",
            "-qmp", f"unix:{directory}/qmp,server=on,wait=off",
            "-device", "virtio-serial-device,id=vs0,max_ports=4",
            "-chardev", f"socket,id=ch0,path={directory}/agent,server=on,wait=off",
            "-device", "virtserialport,bus=vs0.0,chardev=ch0,name=vcnode.agent.0",
            "-device", "virtio-scsi-device,id=scsi0",
            "-fsdev", f"local,id=fs0,path={directory}/shared,security_model=none",
            "-device", "virtio-9p-device,fsdev=fs0,mount_tag=vcnode-shared",
            *(["-incoming", "defer"] if incoming else []),
        ]  # fmt: skip
        with open(directory / "err", "wb") as err:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=err, stderr=err, pass_fds=fds)
        self.spawned.append(BareVm(process, directory))
        return self.spawned[-1]

    def boot(self) -> BareVm:
        """Boot cold and wait for the guest's hello."""
        vm = self._spawn(None)
        vm.open_port()
        vm.read_line()
        return vm

    def time_boot(self, initrd: Path, *, greeting: bytes = b"", until: bytes = b"x") -> float:
        """Seconds from the start of QEMU to the port's bytes *until*; *greeting* is written into it first."""
        began = time.perf_counter()
        vm = self._spawn(None, initrd=initrd)
        try:
            vm.open_port()
            vm.exchange(greeting, until)
            return time.perf_counter() - began
        finally:
            vm.kill()

    def make_template(self) -> None:
        """Boot once and save memory and state."""
        self.template.mkdir()
        vm = self._spawn(self.template / "ram", share=True)
        vm.open_port()
        vm.read_line()
        vm.close_port()
        vm.qmp("stop")
        self._save(vm)
        vm.kill()

    def _save(self, vm: BareVm) -> None:
        vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        vm.qmp("migrate", uri=f"exec:cat > {self.template}/state")
        while vm.qmp("query-migrate").get("status") != "completed":
            time.sleep(0.002)

    def clone(self) -> BareVm:
        """Resume a copy-on-write clone; returns once the guest has answered."""
        fd = os.open(self.template / "state", os.O_RDONLY)
        try:
            vm = self._spawn(self.template / "ram", share=False, incoming=True, fds=(fd,))
        finally:
            os.close(fd)
        vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        vm.qmp("migrate-incoming", uri=f"fd:{fd}")
        while vm.qmp("query-migrate").get("status") != "completed":
            time.sleep(0.001)
        vm.qmp("cont")
        vm.open_port()
        vm.ask(do="ping")
        return vm


@contextlib.contextmanager
def floor(options: Options) -> Iterator[Floor]:
    """A `Floor` in a temporary directory, with the accelerator that works here."""
    work = Path(tempfile.mkdtemp(prefix="vcb-", dir="/var/tmp"))
    made: Floor | None = None
    try:
        made = Floor(options.guest_dir, work, accel=options.accel, kernel_params=options.kernel_params)
        yield made
    finally:
        for vm in made.spawned if made is not None else ():
            vm.kill()
        shutil.rmtree(work, ignore_errors=True)
