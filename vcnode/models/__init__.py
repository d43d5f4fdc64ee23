"""Frozen data models of everything that crosses a boundary: commands, replies, events, records. No I/O.

Models of requests refuse unknown fields and convert nothing; models of replies and events ignore what
they do not know, so that an old client can read a new node. Field descriptions become the contracts.
"""
