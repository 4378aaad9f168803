"""The platform: composes service and device behind the `privatelora` command, with its settings in one place."""

import os

# As in `privatelora.cloud`, here for modules that import torch before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "320")
os.environ.setdefault("LRU_CACHE_CAPACITY", "320")
