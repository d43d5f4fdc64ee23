"""The smallest guests, which end QEMU by themselves.

That of x86_64 switches to long mode, runs CPUID and RDTSC, and says so on a port; that of aarch64 powers off.

It is enough to see whether an accelerator runs guests at all: firmware in real mode, then QEMU's PVH entry in
protected mode, then paging and 64-bit code. Nothing of the host is read, so no guest image is needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

LOAD_ADDRESS = 0x100000
TABLES_BYTES = 0x3000
"""Three page tables follow the page of code."""
EXIT_PORT = 0xF4
EXIT_CODE = 0x21
"""QEMU's exit code when the guest got through: isa-debug-exit makes ``value << 1 | 1`` of the value 0x10."""

_CODE = bytes.fromhex(
    "c7050010100003201000"  # movl $0x102003, 0x101000     PML4[0] -> PDPT
    "c7050020100003301000"  # movl $0x103003, 0x102000     PDPT[0] -> PD
    "c7050030100083000000"  # movl $0x83, 0x103000         PD[0]: 2 MiB at 0
    "b800101000"  #           mov  $0x101000, %eax
    "0f22d8"  #               mov  %eax, %cr3
    "0f20e0"  #               mov  %cr4, %eax
    "83c820"  #               or   $0x20, %eax             PAE
    "0f22e0"  #               mov  %eax, %cr4
    "b9800000c0"  #           mov  $0xc0000080, %ecx       EFER
    "0f32"  #                 rdmsr
    "0d00010000"  #           or   $0x100, %eax            LME
    "0f30"  #                 wrmsr
    "0f20c0"  #               mov  %cr0, %eax
    "0d01000080"  #           or   $0x80000001, %eax       PG, PE
    "0f22c0"  #               mov  %eax, %cr0
    "0f011578001000"  #       lgdt 0x100078
    "ea560010000800"  #       ljmp $8, $0x100056
    "31c0"  #                 xor  %eax, %eax              64-bit code from here
    "0fa2"  #                 cpuid
    "0f31"  #                 rdtsc
    "b010"  #                 mov  $0x10, %al
    "e6f4"  #                 out  %al, $0xf4              the end
    "f4"  #               1:  hlt
    "ebfd"  #                 jmp  1b
    "0f1f440000"  #           nop, to the next 8 bytes
    "0000000000000000"  #     GDT: null
) + struct.pack("<QHI", 0x0020_9A00_0000_0000, 15, LOAD_ADDRESS + 0x68)


def guest_elf() -> bytes:
    """The guest as a 32-bit ELF file with a PVH entry note.

    Source: System V ABI (ELF); Xen docs/misc/pvh.pandoc, XEN_ELFNOTE_PHYS32_ENTRY = 18.
    """
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", LOAD_ADDRESS)
    header_bytes, program_header_bytes = 52, 32
    note_offset = header_bytes + 2 * program_header_bytes
    code_offset = 0x1000
    header = struct.pack(
        "<4sBBBB8xHHIIIIIHHHHHH",
        *(b"\x7fELF", 1, 1, 1, 0),  # 32-bit, little-endian
        *(2, 3, 1),  # executable, 386
        *(LOAD_ADDRESS, header_bytes, 0, 0),
        *(header_bytes, program_header_bytes, 2, 0, 0, 0),
    )
    load = struct.pack(
        "<IIIIIIII",
        *(1, code_offset, LOAD_ADDRESS, LOAD_ADDRESS),
        *(len(_CODE), 0x1000 + TABLES_BYTES, 7, 0x1000),
    )
    notes = struct.pack("<IIIIIIII", 4, note_offset, 0, 0, len(note), len(note), 4, 4)
    return (header + load + notes + note).ljust(code_offset, b"\0") + _CODE


def guest_image() -> bytes:
    """The guest as an ``Image`` of aarch64: it asks the firmware to power off.

    Source: Linux, Documentation/arch/arm64/booting.rst, "Call the kernel image"; Arm DEN0022, SYSTEM_OFF.
    """
    header_bytes = 64
    code = struct.pack(
        "<4I",
        0x52800100,  # mov  w0, #0x8
        0x72B08000,  # movk w0, #0x8400, lsl #16     SYSTEM_OFF
        0xD4000002,  # hvc  #0
        0x14000000,  # b    .
    )
    branch = 0x14000000 | header_bytes // 4
    header = struct.pack("<IIQQQQQQII", branch, 0, 0, header_bytes + len(code), 0, 0, 0, 0, 0x644D5241, 0)
    return header + code


@dataclass(frozen=True, slots=True)
class Probe:
    """A guest, and how QEMU ends when it got through."""

    guest: bytes
    args: tuple[str, ...]
    """What QEMU needs for it, besides."""
    exit_code: int


def of(architecture: str) -> Probe:
    """The guest for an architecture, x86_64 or aarch64."""
    if architecture == "aarch64":
        return Probe(guest_image(), (), 0)
    return Probe(guest_elf(), ("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4"), EXIT_CODE)
