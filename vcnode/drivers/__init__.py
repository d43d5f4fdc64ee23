"""Drivers: what touches the host and the guest. ``base`` holds their Protocols, nothing else is shared."""
