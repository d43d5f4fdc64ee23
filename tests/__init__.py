"""All tests; what they share is in `tests.support` and conftest.py."""
