"""NATS: the connection, the service endpoints, the event publisher, a private server.

Only this package and `vcnode.client` import ``nats``.
"""
