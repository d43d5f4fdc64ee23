"""What runs inside the VM, and its wire protocol, which the host uses too. Standard library only."""
