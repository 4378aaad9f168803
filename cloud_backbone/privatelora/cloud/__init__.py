"""The service's half: the frozen model, its adapter sets, and the data plane that devices compute over."""

import os

# torch's idle threads look for work for some ten microseconds, which lasts from one operator of a layer to the next,
# and sleep then. Did they sleep at once, 32 sessions with four inline layers got a seventh less; did they look for as
# long as OpenMP has it, they took the cores from everything else (a demo of 146 s took 429 s). OpenMP reads both when
# torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
