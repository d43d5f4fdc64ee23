#!/usr/bin/python3 -ISB
"""Init of the bare guest: the least that a guest must do, against which the product is measured.

Loads the image's modules, opens the serial port, and answers one JSON line per request. Nothing here is
shared with vcnode. It runs as PID 1 of a VM, never on a host.
"""

import ctypes
import json
import os
import time

libc = ctypes.CDLL(None, use_errno=True)


def mount(source, target, kind, flags=0, data=""):
    """mount(2)."""
    os.makedirs(target, exist_ok=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def load_modules():
    """finit_module(2) for every module of the image, in the image's order."""
    with open("/etc/vcnode/modules") as names:
        for name in names.read().split():
            fd = os.open("/lib/modules/" + name, os.O_RDONLY)
            libc.syscall(313, fd, b"", 0)
            os.close(fd)


def port():
    """Open the agent's port; the module has just made it, devtmpfs shows it at once."""
    base = "/sys/class/virtio-ports"
    while True:
        for name in os.listdir(base) if os.path.isdir(base) else ():
            with open(f"{base}/{name}/name") as f:
                if f.read().strip() == "vcnode.agent.0":
                    return os.open(f"/dev/{name}", os.O_RDWR)
        time.sleep(0.01)


def disk(serial):
    """Name of the SCSI disk with this serial, or None while there is none that can be opened."""
    for name in os.listdir("/sys/block"):
        try:
            with open(f"/sys/block/{name}/device/vpd_pg80", "rb") as f:
                if f.read()[4:].decode().strip() == serial:
                    # The kernel shows a disk a moment before it lets anybody open it.
                    os.close(os.open("/dev/" + name, os.O_RDONLY))
                    return name
        except OSError:
            continue
    return None


def start(request):
    """Mount the image under an overlay, fork, chroot and exec; answers once exec has happened."""
    name = disk(request["disk"])
    while name is None:
        time.sleep(0.002)
        name = disk(request["disk"])
    mount("/dev/" + name, "/run/lower", "erofs", 1)
    mount("tmpfs", "/run/rw", "tmpfs")
    os.mkdir("/run/rw/u")
    os.mkdir("/run/rw/w")
    mount("overlay", "/run/root", "overlay", 0, "lowerdir=/run/lower,upperdir=/run/rw/u,workdir=/run/rw/w")
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chroot("/run/root")
        os.chdir("/")
        os.execv(request["args"][0], request["args"])
    os.close(w)
    os.read(r, 1)
    return {"pid": pid}


def run(request):
    """Fork, exec and wait."""
    pid = os.fork()
    if pid == 0:
        os.execv(request["args"][0], request["args"])
    return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def write_all(fd, size):
    """Write so many bytes to the port."""
    block = memoryview(bytes(131072))
    while size:
        size -= os.write(fd, block[:size])
    return {}


def read_all(fd, size):
    """Read so many bytes from the port."""
    while size:
        size -= len(os.read(fd, min(size, 131072)))
    return {}


def main():
    """Serve requests for ever."""
    for kind, target in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run")):
        mount(kind, target, kind)
    load_modules()
    fd = port()
    os.write(fd, b'{"hello": 1}\n')
    buffer = b""
    while True:
        chunk = os.read(fd, 65536)
        if not chunk:
            time.sleep(0.001)
            continue
        buffer += chunk
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            request = json.loads(line)
            if request["do"] in ("write", "read"):
                os.write(fd, b'{"go": 1}\n')  # the host sends nothing before, so nothing else was read
                {"write": write_all, "read": read_all}[request["do"]](fd, request["size"])
            answer = {"start": start, "run": run}.get(request["do"], lambda r: {})(request)
            os.write(fd, json.dumps(answer).encode() + b"\n")


main()
