"""Benchmarks: each measures a floor and vcnode in one run and prints their ratio."""
