"""The floor: the smallest script that does the same physical work with QEMU, by raw sockets.

Nothing of vcnode is used here. The guest runs the same kernel and modules with ``bare_guest.py`` as init.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QEMU = "qemu-system-x86_64"


def _cpio_entry(name: str, mode: int, data: bytes, ino: int) -> bytes:
    """One entry of a newc archive. Source: cpio(5)."""
    raw = name.encode() + b"\0"
    fields = (ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08x" % f for f in fields) + raw
    head += b"\0" * (-len(head) % 4)
    return head + data + b"\0" * (-len(data) % 4)


def bare_initrd(initrd: Path, init: bytes, out: Path) -> None:
    """Write *out*: the image's initrd with another ``/init`` (the kernel unpacks archives in turn)."""
    extra = _cpio_entry("init", 0o100755, init, 1) + _cpio_entry("TRAILER!!!", 0, b"", 2)
    base = initrd.read_bytes()
    out.write_bytes(base + b"\0" * (-len(base) % 4) + extra)


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
        self.template = work / "template"

    def _spawn(self, ram: Path, *, share: bool, incoming: bool, fds: tuple[int, ...] = ()) -> BareVm:
        directory = Path(tempfile.mkdtemp(dir=self.work, prefix="b"))
        (directory / "shared").mkdir()
        size = f"{self.mem_size_mib}M"
        cpu = "host" if self.accel == "kvm" else "max"
        argv = [
            QEMU, "-M", f"microvm,accel={self.accel},memory-backend=ram", "-cpu", cpu, "-m", size, "-smp", "1",
            "-object", f"memory-backend-file,id=ram,size={size},mem-path={ram},share={'on' if share else 'off'}",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{directory}/console",
            "-kernel", str(self.kernel), "-initrd", str(self.initrd),
            "-append", f"console=ttyS0 quiet panic=-1 reboot=t {self.kernel_params}",
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
        return BareVm(process, directory)

    def boot(self) -> BareVm:
        """Boot cold and wait for the guest's hello."""
        ram = Path(tempfile.mkstemp(dir=self.work, prefix="ram")[1])
        vm = self._spawn(ram, share=True, incoming=False)
        vm.open_port()
        vm.read_line()
        ram.unlink()
        return vm

    def make_template(self) -> None:
        """Boot once and save memory and state."""
        self.template.mkdir()
        vm = self._spawn(self.template / "ram", share=True, incoming=False)
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
def floor(guest_dir: Path, **kwargs: Any) -> Iterator[Floor]:
    """A `Floor` in a temporary directory."""
    work = Path(tempfile.mkdtemp(prefix="vcb-", dir="/var/tmp"))
    try:
        yield Floor(guest_dir, work, **kwargs)
    finally:
        shutil.rmtree(work, ignore_errors=True)
