"""Benchmarks: what this project claims in figures, measured on this machine (`make bench`, `python -m benchmarks`)."""
