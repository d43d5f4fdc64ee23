"""The heart: what a pod is, what may happen to it, and how nothing of it gets lost.

::

    service   one method per command; takes the pod's lock and hands over to
      start, stop, containers, exec, recovery     the acts: thin async code over the drivers
      watch       what happens without a command: a VM ends, a session is lost, a container exits
    ledger      the one place where a pod's record changes, with its event, in one transaction
      lifecycle, statuses, process                pure: what is allowed, how it looks, what runs
    journal, outbox, images                        what else is kept
    store       SQLite: one writer, snapshots for readers
    locks, undo                                    one command per pod; nothing allocated without its undo

Knows drivers by their Protocols only.
"""
