"""Hypervisor drivers: ``qemu`` runs VMs, ``mock`` only pretends. Both stand behind `vcnode.drivers.base`."""
