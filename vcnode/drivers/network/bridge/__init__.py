"""Network driver ``bridge``: pods on bridges of the host, with addresses of the node's subnets."""

from vcnode.drivers.network.bridge.driver import BridgeNetwork
from vcnode.drivers.network.bridge.firewall import Nft

__all__ = ["BridgeNetwork", "Nft"]
