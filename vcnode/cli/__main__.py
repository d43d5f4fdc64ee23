"""``python -m vcnode.cli`` is the ``vcnode`` command."""

from vcnode.cli import main

main()
