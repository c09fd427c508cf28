"""Timings and memory of the ops beside their peers: `python -m benchmarks NAME [--json FILE]`."""
