"""The streams of a session (docs/streams.md), for both of its ends: nothing here knows NATS.

`frames` is the wire, `endpoint` the protocol without I/O, `carrier` its asyncio shell.
"""
