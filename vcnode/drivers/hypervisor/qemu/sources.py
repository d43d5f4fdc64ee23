"""Where a VM's memory and state come from: a boot, a template, or a boot that is to become a template."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vcnode.aio import deadline_as, finish
from vcnode.drivers.audit import Held
from vcnode.drivers.base import TemplateInfo
from vcnode.drivers.hypervisor.qemu import templates
from vcnode.drivers.hypervisor.qemu.templates import BrokenTemplateError, Draft, TemplateStore
from vcnode.errors import HypervisorError, NotFoundError
from vcnode.models.vm import VmShape, VmSpec

if TYPE_CHECKING:
    from vcnode.drivers.hypervisor.qemu.vm import QemuVm

log = logging.getLogger(__name__)

LAYOUT = 4
"""Counts changes that make old templates useless: of devices, of machine, of what a guest rehearses."""
DISCARD_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Making:
    """A template that a VM is to become."""

    key: str
    draft: Draft


@dataclass(frozen=True, slots=True)
class Source:
    """The part of a command line that says where memory and state come from. The default is a plain boot."""

    ram_file: Path | None = None
    ram_share: bool = False
    ram_fd: int | None = None
    state_fd: int | None = None
    incoming: str | None = None


class Sources:
    """Templates as the driver uses them; the blocking work is done in threads."""

    def __init__(self, directory: Path) -> None:
        self._store = TemplateStore(directory)
        self._drafts: dict[str, _Making] = {}
        """By VM."""
        self._inputs: tuple[str, ...] = ()
        self._files: dict[Path, tuple[tuple[int, int, int], str]] = {}
        self._loading = asyncio.Lock()

    async def open(self, *inputs: str) -> None:
        """Sweep the directory, and note what all keys hang on. Raises HypervisorError."""
        self._inputs = inputs
        await asyncio.to_thread(self._store.sweep)

    def close(self) -> None:
        """Free the memory of all templates. Idempotent."""
        self._store.close()

    def key(self, shape: VmShape, files: Sequence[Path]) -> str:
        """See `vcnode.drivers.base.Templating.template_key`; *files* are the guest's kernel and initrd."""
        facts = [LAYOUT, *self._inputs, *(self._digest(path) for path in files)]
        text = json.dumps([facts, shape.model_dump()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    async def list(self) -> Sequence[TemplateInfo]:
        """See `vcnode.drivers.base.Templating.list_templates`."""

        def read() -> list[TemplateInfo]:
            store = self._store
            return [TemplateInfo(key, store.used_bytes(key), store.idle_s(key)) for key in store.names()]

        return await asyncio.to_thread(read)

    async def load(self, key: str, *, timeout_s: float) -> bool:
        """See `vcnode.drivers.base.Templating.load_template`."""
        late = HypervisorError(f"Template {key} was not read within {timeout_s:g} s.")
        async with deadline_as(timeout_s, lambda: late), self._loading:
            try:
                await asyncio.to_thread(self._store.load, key)
            except NotFoundError:
                return False
            except BrokenTemplateError as exc:
                log.warning("Template %s is dropped", key, exc_info=exc)
                await self.drop(key)
                return False
        return True

    async def drop(self, key: str) -> None:
        """See `vcnode.drivers.base.Templating.drop_template`."""
        for vm_id in [vm_id for vm_id, making in self._drafts.items() if making.key == key]:
            self.forget(vm_id)
        await asyncio.to_thread(self._store.drop, key)

    def take(self, spec: VmSpec, ours: ExitStack) -> Source:
        """Open what *spec* starts from; *ours* closes our side once QEMU has its own.

        Raises:
            NotFoundError, BrokenTemplateError: The template that it names cannot be used.
            HypervisorError: A new template cannot be begun.
        """
        if spec.clone_of is not None:
            loaded = self._store.load(spec.clone_of)
            state = templates.state_fd(loaded.state)
            ours.callback(os.close, state)
            return Source(
                ram_file=Path(f"/proc/self/fd/{loaded.ram_fd}"),
                ram_fd=loaded.ram_fd,
                state_fd=state,
                incoming="defer",
            )
        if spec.template_key is not None:
            draft = self._store.draft(spec.template_key, spec.vm_id)
            self._drafts[spec.vm_id] = _Making(spec.template_key, draft)
            return Source(ram_file=draft.ram, ram_share=True)
        return Source()

    async def save(self, vm: QemuVm, *, timeout_s: float) -> None:
        """See `vcnode.drivers.base.Templating.save_template`."""
        vm_id = vm.record.vm_id
        making = self._drafts.pop(vm_id, None)
        if making is None:
            raise HypervisorError(f"VM {vm_id} was not launched to become a template.")
        late = HypervisorError(f"Template {making.key} was not saved within {timeout_s:g} s.")
        try:
            async with deadline_as(timeout_s, lambda: late):
                with making.draft.state.open("xb") as state:
                    await vm.migration.save(state.fileno(), timeout_s=timeout_s)
                # The memory is whole only once nobody writes to it any more.
                await vm.stop(grace_s=0)
                await asyncio.to_thread(self._store.publish, making.key, making.draft)
        except BaseException:
            await finish(asyncio.to_thread(self._store.discard, making.draft), timeout_s=DISCARD_LIMIT_S)
            raise

    async def held(self, mark: str) -> Sequence[Held]:
        """Templates, finished and begun, as files; see `vcnode.drivers.audit.Auditable.held`."""

        def look() -> list[Held]:
            begun = [
                Held("template", str(draft.directory), vm_id) for draft, vm_id in self._store.drafts(mark)
            ]
            return begun + [Held("template", name, None) for name in self._store.names()]

        return await asyncio.to_thread(look)

    async def discard(self, vm_id: str) -> None:
        """Remove what was begun for a VM that will not become a template. Idempotent."""
        self._drafts.pop(vm_id, None)

        def discard() -> None:
            for draft, _ in (found for found in self._store.drafts(vm_id) if found[1] == vm_id):
                self._store.discard(draft)

        await asyncio.to_thread(discard)

    def forget(self, vm_id: str) -> None:
        """The VM will not become a template: its launch failed. Idempotent."""
        if (making := self._drafts.pop(vm_id, None)) is not None:
            self._store.discard(making.draft)

    def _digest(self, path: Path) -> str:
        """Digest of a file, computed anew only when the file has changed."""
        stat = path.stat()
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._files.get(path)
        if known is None or known[0] != version:
            with path.open("rb") as file:
                known = self._files[path] = (version, hashlib.file_digest(file, "sha256").hexdigest())
        return known[1]
