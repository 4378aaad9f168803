"""The service's half: the frozen model, its adapter sets, and the data plane that devices compute over."""

import os

# torch's idle threads look for work for some ten microseconds, which lasts from one operator of a layer to the next,
# and sleep then. Did they sleep at once, 32 sessions with four inline layers got a seventh less; did they look for as
# long as OpenMP has it, they took the cores from everything else (a demo of 146 s took 429 s). OpenMP reads both when
# torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# oneDNN and torch each keep a prepared kernel for every row count, shape and number of threads, 1024 of them unless
# told otherwise. Passes of 300 lengths took 1.2 GB that way in bfloat16, outside the memory budget; with 320, which is
# 64 row counts of a layer's five products on one number of threads, 0.5 GB. To make one again costs 0.5 ms.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "320")
os.environ.setdefault("LRU_CACHE_CAPACITY", "320")
