"""The checks of ``vcnode doctor`` that need a driver, the guest image or NATS."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vcnode.aio import Tasks
from vcnode.client import Client
from vcnode.doctor import Finding, Level, Probe
from vcnode.errors import VcnodeError
from vcnode.guest import image
from vcnode.models.network import NetworkModel
from vcnode.models.pod import HypervisorType
from vcnode.settings import Settings


def probes(settings: Settings) -> Sequence[tuple[str, Probe]]:
    """The checks, by name."""
    cni = (("cni", lambda: check_cni(settings)),) if settings.network is NetworkModel.CNI else ()
    return (
        ("accelerator", lambda: check_accelerator(settings)),
        ("guest-image", lambda: check_guest_image(settings)),
        *cni,
        ("network", lambda: check_network(settings)),
        ("nats", lambda: check_nats(settings)),
    )


async def check_accelerator(settings: Settings) -> Finding:
    """KVM runs a guest, not only opens; the node agent's own test, whose answer it remembers.

    Raises:
        HypervisorError: No accelerator works; says what to do.
    """
    from vcnode.node import choose_drivers

    wanted = settings.model_copy(update={"hypervisor": HypervisorType.QEMU})
    async with Tasks() as tasks:
        hypervisor = choose_drivers(wanted, tasks).hypervisors[HypervisorType.QEMU]
        await hypervisor.open()
    notes = "; ".join(hypervisor.info.notes)
    if hypervisor.accelerator == "kvm":
        return Finding("accelerator", "ok", "KVM runs guests" + (f"; {notes}" if notes else ""))
    return Finding(
        "accelerator",
        "warn",
        notes or "KVM does not run guests here; TCG is used, which is several times slower",
        "Turn virtualisation on in the firmware, load kvm_intel or kvm_amd, or allow nested virtualisation.",
    )


async def check_network(settings: Settings) -> Finding:
    """Pods can be connected by a bridge, and reach the outside."""
    from vcnode.drivers.network.bridge import BridgeNetwork, Nft
    from vcnode.pods.marks import mark_of

    nft = await asyncio.to_thread(Nft.find)
    network = BridgeNetwork(settings.bridge, mark_of(settings), nft)
    obstacle = await network.find_obstacle()
    if obstacle is not None:
        level: Level = "fail" if settings.network is NetworkModel.BRIDGE else "warn"
        return Finding("network", level, "no pod can be connected by a bridge", obstacle)
    if nft is None:
        return Finding(
            "network",
            "warn",
            "bridge works, but without nftables pods do not reach the outside and publish no ports",
            "Install the package nftables.",
        )
    if (refused := await network.find_nft_obstacle()) is not None:
        words = "bridge works, but pods do not reach the outside and publish no ports"
        return Finding("network", "warn", words, refused)
    return Finding("network", "ok", "bridge works, with masquerading and published ports")


async def check_guest_image(settings: Settings) -> Finding:
    """The guest image is there, whole, and holds the guest agent of this version."""
    build = f"Run: vcnode guest build --out {settings.guest_dir}"
    try:
        found = await asyncio.to_thread(image.load, settings.guest_dir)
    except image.GuestImageError as exc:
        return Finding("guest-image", "fail", str(exc), build)
    detail = f"{found.directory}, kernel {found.kernel_release}, agent {found.agent_version}"
    if await asyncio.to_thread(image.is_current, found):
        return Finding("guest-image", "ok", detail)
    return Finding("guest-image", "warn", f"{detail}, made by another version of vcnode", build)


async def check_cni(settings: Settings) -> Finding:
    """CNI networks are configured, and their plugins are there and ready."""
    from vcnode.drivers.network.cni import CniNetwork

    ready, problems = await CniNetwork(settings.cni, settings.state_dir).examine()
    mend = (
        f"Put a configuration into {settings.cni.conf_dir}, and its plugins (package "
        f"containernetworking-plugins) into one of {', '.join(map(str, settings.cni.bin_dirs))}."
    )
    if problems:
        return Finding("cni", "warn" if ready else "fail", " ".join(problems), mend)
    if not ready:
        return Finding("cni", "fail", f"no network in {settings.cni.conf_dir}", mend)
    return Finding("cni", "ok", f"networks {', '.join(ready)}; the first is the default")


async def check_nats(settings: Settings) -> Finding:
    """NATS lets us in."""
    try:
        client = await Client.connect(settings.nats, name="vcnode-doctor")
    except VcnodeError as exc:
        mend = "Start a nats-server there, or set nats.url (VCNODE_NATS_URL, --nats-url)."
        return Finding("nats", "fail", exc.message, mend)
    await client.close()
    return Finding("nats", "ok", settings.nats.url.rpartition("@")[2])
