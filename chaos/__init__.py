"""The chaos run: a scheduler sends commands, havoc kills what runs them, a ledger keeps account of both."""
