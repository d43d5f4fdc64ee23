"""``guest-boot``: a cold boot of the guest image to the agent's hello."""

from __future__ import annotations

from bench.bare import Floor, floor
from bench.options import Options
from bench.report import Result, Series
from vcnode.guest import protocol


def time_guest(bare: Floor) -> float:
    """Seconds from a bare QEMU's start to the hello of the guest image's own agent."""
    host = protocol.Host("0" * 32)
    host.send_sync()
    return bare.time_boot(bare.full_initrd, greeting=host.data_to_send(), until=b"agent_version")


async def guest_boot(options: Options) -> Result:
    """Boot in turn the guest image, and the same kernel and modules with a few lines of shell as init."""
    rounds = 3 if options.quick else 9
    ours: list[float] = []
    shell: list[float] = []
    with floor(options) as bare:
        for _ in range(rounds):
            shell.append(bare.time_boot(bare.shell_initrd) * 1000)
            ours.append(time_guest(bare) * 1000)
    least, guest = Series("shell init", "ms", tuple(shell)), Series("guest image", "ms", tuple(ours))
    return Result(
        "guest-boot",
        guest.median / least.median,
        of="QEMU's start to the agent's hello, against the same kernel and modules with a shell as init",
        reach=1.6,
        series=(least, guest),
    )
