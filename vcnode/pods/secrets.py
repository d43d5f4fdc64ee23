"""Opens secrets, just before they go to a guest. What is opened is handed on and kept nowhere."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence

from vcnode.errors import InvalidArgumentError, VcnodeError
from vcnode.models.pod import Cmd, ContainerSpec, EnvVar
from vcnode.models.secrets import MAX_SECRET_BYTES, Sealed
from vcnode.models.vm import GuestSecret
from vcnode.models.xkeys import BadKeyError, CurveKey

ReadFile = Callable[[str], Awaitable[bytes]]
"""See `vcnode.drivers.base.Storage.read_secret`."""


class Secrets:
    """Opens what was sealed for this node, and reads what lies on its host.

    Args:
        keys: The node's own first.
        read: Reads a file of the host.
    """

    def __init__(self, keys: Sequence[CurveKey], read: ReadFile) -> None:
        self._keys = {key.public: key for key in keys}
        self._read = read

    @property
    def public_keys(self) -> tuple[str, ...]:
        """For whom callers may seal."""
        return tuple(self._keys)

    def sealed_for_others(self, spec: ContainerSpec) -> list[str]:
        """Keys that *spec* needs and this node does not have."""
        boxes = [*(each.sealed for each in spec.cmd.envs), *(each.sealed for each in spec.secrets)]
        return sorted({box.to for box in boxes if box is not None} - self._keys.keys())

    async def check(self, spec: ContainerSpec, where: str) -> None:
        """See that everything secret in a container can be had; *where* it stands in the request.

        Raises:
            InvalidArgumentError, NotFoundError: Something cannot; names the field.
        """
        await self.cmd(spec.cmd, f"{where}.cmd")
        await self.files(spec, where)

    async def cmd(self, cmd: Cmd, where: str = "cmd") -> Cmd:
        """The command with all values of its environment in clear. Raises as `check`."""
        if all(variable.value is not None for variable in cmd.envs):
            return cmd
        envs = [await self._variable(each, f"{where}.envs[{n}]") for n, each in enumerate(cmd.envs)]
        return cmd.model_copy(update={"envs": tuple(envs)})

    async def files(self, spec: ContainerSpec, where: str = "container") -> tuple[GuestSecret, ...]:
        """The secret files of a container. Raises as `check`."""
        found = []
        for number, each in enumerate(spec.secrets):
            field = f"{where}.secrets[{number}]"
            data = await self._content(each.sealed, each.file, field)
            found.append(GuestSecret(name=each.name, mode=each.mode, data=data))
        return tuple(found)

    async def _variable(self, variable: EnvVar, field: str) -> EnvVar:
        if variable.value is not None:
            return variable
        raw = await self._content(variable.sealed, variable.file, field)
        if variable.file is not None:
            raw = raw.removesuffix(b"\n")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise InvalidArgumentError.field(field, "holds something else than UTF-8 text without NUL")
        return EnvVar(var=variable.var, value=text)

    async def _content(self, sealed: Sealed | None, file: str | None, field: str) -> bytes:
        if sealed is not None:
            content = self._open(sealed, field)
            if len(content) > MAX_SECRET_BYTES:
                raise InvalidArgumentError.field(field, f"holds more than {MAX_SECRET_BYTES} bytes")
            return content
        try:
            return await self._read(file or "")
        except VcnodeError as exc:
            raise type(exc)(f"{field}: {exc.message}", **{**exc.details, "field": field}) from exc

    def _open(self, sealed: Sealed, field: str) -> bytes:
        key = self._keys.get(sealed.to)
        if key is None:
            raise InvalidArgumentError.field(
                field, f"is sealed for {sealed.to}; this node has {', '.join(self._keys)}"
            )
        try:
            return key.open(base64.b64decode(sealed.data, validate=True), sealed.sender)
        except (BadKeyError, binascii.Error) as exc:
            # The cause is chained, and says nothing of the content.
            raise InvalidArgumentError.field(
                field, "does not open: another sender, another key, or it was changed; seal it again"
            ) from exc


def secret_names(cmd: Cmd) -> tuple[str, ...]:
    """Variables whose values nobody may write down."""
    return tuple(variable.var for variable in cmd.envs if variable.value is None)
