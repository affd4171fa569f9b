"""Measurements that run from the checkout: `python -m benchmarks.NAME --help`."""
