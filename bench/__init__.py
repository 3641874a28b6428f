"""Benchmarks: `pytest bench --benchmark-json=FILE`, then `python -m bench.report FILE`."""
