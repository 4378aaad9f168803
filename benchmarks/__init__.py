"""Benchmarks: what this project claims in figures, measured on this machine (`make bench`, `python -m benchmarks`)."""

import os

ENVIRONMENT = dict(os.environ)
"""As the command was started with: what services and other processes get, whatever imports add."""

# What transformers' users have, where a service of ours keeps fewer prepared kernels for itself.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
os.environ.setdefault("LRU_CACHE_CAPACITY", "1024")
