"""Guest agent drivers: native (our agent in a VM), mock (a guest that only pretends), noop (none)."""
