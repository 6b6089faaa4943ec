"""Benchmarks: ours and what a user would write instead, interleaved in one run. `python -m benchmarks --help`."""
