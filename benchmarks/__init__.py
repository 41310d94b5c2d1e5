"""Benchmarks of time, memory, operations and quality: `python -m benchmarks.step` and others, from the root."""
