"""Benchmarks: what this project claims in figures, measured on this machine (`make bench`, `python -m benchmarks`)."""

import os

ENVIRONMENT = dict(os.environ)
"""As the command was started with: what services and other processes get, whatever imports add."""
