"""Networks for VMs: ``noop`` leaves the guest without one."""
