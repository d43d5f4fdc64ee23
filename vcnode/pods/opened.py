"""A process inside a running container, with its secrets opened."""

from __future__ import annotations

from vcnode.models.pod import Cmd
from vcnode.models.records import ContainerRecord
from vcnode.models.vm import GuestProcess
from vcnode.pods.process import exec_process
from vcnode.pods.secrets import Secrets


async def opened_process(secrets: Secrets, cmd: Cmd, container: ContainerRecord | None) -> GuestProcess:
    """As `exec_process`, secrets of the command and of the container's environment in clear.

    Raises:
        InvalidArgumentError: As there, or a secret cannot be opened.
        NotFoundError: The file of one is gone.
    """
    clear = await secrets.cmd(cmd)
    if container is None:
        return exec_process(clear, None)
    spec = container.spec
    lending = spec.model_copy(update={"cmd": await secrets.cmd(spec.cmd, "container.cmd")})
    return exec_process(clear, lending, container.image_config)
