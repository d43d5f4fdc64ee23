"""One short function per command, and the dispatch from bytes to them. No NATS here."""
