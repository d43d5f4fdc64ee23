"""What tests share: a NATS server of either kind, leak checks, safe temporary directories."""
