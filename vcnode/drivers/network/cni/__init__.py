"""Network driver ``cni``: pods in the networks of CNI plugins."""

from vcnode.drivers.network.cni.driver import CniNetwork

__all__ = ["CniNetwork"]
