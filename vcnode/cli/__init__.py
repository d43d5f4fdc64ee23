"""The ``vcnode`` command: what people and scripts type. It is the first user of `vcnode.client`."""


def main() -> None:
    """Entry point of the ``vcnode`` command."""
    from vcnode.cli.app import main as run

    run()
