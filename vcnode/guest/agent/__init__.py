"""The guest agent: what runs inside the VM, as root, on nothing but the standard library.

``init`` is PID 1 and starts ``agent``, which speaks contracts/guest-protocol.md on the port and makes the
containers. Both live in one image of memory (the agent is forked, not executed) and both sleep when there is
nothing to do: no timers, no polling.

Who knows whom, top to bottom; nothing imports upward::

    init > agent > service > containers, execs, identity > rootfs, spawn, disks, mounts, cgroups
         > process > users, capabilities, limits > params, loop > syscalls, failures
"""
