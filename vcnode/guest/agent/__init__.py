"""The guest agent: what runs inside the VM, as root, on nothing but the standard library.

``init`` is PID 1 and starts ``agent``, which speaks contracts/guest-protocol.md on the port and makes the
containers; ``forker`` is a third process, which starts processes for it. All three live in one image of
memory (forked, not executed), and all sleep when there is nothing to do: no timers, no polling.

Who knows whom, top to bottom; nothing imports upward::

    init > agent > service > containers, execs, identity > spawn, disks, mounts, cgroups, port
         > forker > child > rootfs > entries, process > users, capabilities, limits, devices
         > params, loop, uevents > syscalls, failures, ring, undo
"""
