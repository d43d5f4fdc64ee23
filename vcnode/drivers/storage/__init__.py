"""Host directories and images for VMs: ``local`` does it, ``mock`` pretends.

Imports nothing itself: the unpacker runs in a process of its own and must start quickly.
"""
