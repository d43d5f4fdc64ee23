"""What runs in a container: the pod's spec and the image's config become one process. Pure."""

from __future__ import annotations

from vcnode.errors import InvalidArgumentError
from vcnode.models.capabilities import ALL_CAPABILITIES, DEFAULT_CAPABILITIES
from vcnode.models.image import ImageConfig
from vcnode.models.pod import Cmd, ContainerSpec
from vcnode.models.vm import GuestProcess

RLIMITS = frozenset(
    [
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ]
)
"""Names of resource limits. Source: getrlimit(2)."""


NO_CONFIG = ImageConfig()
"""Of a root without a config: a host directory, or an image made of one."""


def guest_process(spec: ContainerSpec, config: ImageConfig = NO_CONFIG) -> GuestProcess:
    """The main process of a container.

    Raises:
        InvalidArgumentError: Neither names a command, or a name in it is unknown; the field is relative to
            the container.
    """
    args = spec.cmd.args or (*config.entrypoint, *config.cmd)
    if not args:
        raise InvalidArgumentError.field("cmd.args", "is required: the image names no command")
    return _process(spec.cmd, args, config, DEFAULT_CAPABILITIES)


def exec_process(cmd: Cmd, container: ContainerSpec | None, config: ImageConfig = NO_CONFIG) -> GuestProcess:
    """A process inside a running container, which lends what *cmd* does not say; None: in the guest itself.

    Raises:
        InvalidArgumentError: There is nothing to run, or a name in it is unknown.
    """
    if not cmd.args:
        raise InvalidArgumentError.field("cmd.args", "must not be empty")
    if container is None:
        process = _process(cmd, cmd.args, NO_CONFIG, ALL_CAPABILITIES)
        return process if cmd.user else process.model_copy(update={"user": ""})
    main = container.cmd
    lent = ImageConfig(
        env=_merged(config.env, main),
        workdir=main.workdir or config.workdir,
        user=_user_and_group(main, config),
    )
    capabilities = DEFAULT_CAPABILITIES if main.capabilities is None else main.capabilities
    return _process(cmd, cmd.args, lent, capabilities)


def _process(
    cmd: Cmd, args: tuple[str, ...], config: ImageConfig, capabilities: tuple[str, ...]
) -> GuestProcess:
    if not args[0]:
        raise InvalidArgumentError.field("cmd.args[0]", "must name a program")
    wanted = capabilities if cmd.capabilities is None else cmd.capabilities
    for index, name in enumerate(wanted):
        if name not in ALL_CAPABILITIES:
            raise InvalidArgumentError.field(
                f"cmd.capabilities[{index}]", f"{name} is no capability of Linux; see capabilities(7)"
            )
    for index, rlimit in enumerate(cmd.rlimits):
        if rlimit.type not in RLIMITS:
            raise InvalidArgumentError.field(
                f"cmd.rlimits[{index}].type", f"{rlimit.type} is none of {', '.join(sorted(RLIMITS))}"
            )
    user, group = _split(cmd, config)
    return GuestProcess(
        args=args,
        envs=_merged(config.env, cmd),
        workdir=cmd.workdir or config.workdir or "/",
        user=user,
        group=group,
        supplementary_groups=cmd.supplementary_groups,
        rlimits=tuple((r.type, r.soft, r.hard) for r in cmd.rlimits),
        no_new_privileges=cmd.no_new_privileges,
        capabilities=wanted,
    )


def _merged(base: tuple[tuple[str, str], ...], cmd: Cmd) -> tuple[tuple[str, str], ...]:
    # A secret that was not opened (at admission: nothing runs there) counts as empty.
    return tuple({**dict(base), **{e.var: e.value or "" for e in cmd.envs}}.items())


def _split(cmd: Cmd, config: ImageConfig) -> tuple[str, str | None]:
    """User and group; the image's group counts only with the image's user."""
    named = cmd.user or config.user or ""
    user, _, group = named.partition(":")
    if cmd.group and cmd.user and group:
        raise InvalidArgumentError.field("cmd.group", f"is given twice: here, and in user {cmd.user!r}")
    return user or "0", cmd.group or group or None


def _user_and_group(cmd: Cmd, config: ImageConfig) -> str:
    user, group = _split(cmd, config)
    return user if group is None else f"{user}:{group}"
