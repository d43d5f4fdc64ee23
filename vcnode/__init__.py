"""vcnode: a per-host node agent that runs pods as small virtual machines, driven over NATS.

Nothing is imported here: the guest agent ships inside the VM under this same package name and
must not pull in anything of the host side.
"""

__version__ = "0.1.0"
