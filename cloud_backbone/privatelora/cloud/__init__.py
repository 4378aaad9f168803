"""The service's half: the frozen model, its adapter sets, and the data plane that devices compute over."""

import os

# How long torch's idle threads look for work before they sleep: longer than from one operation to the next, so that
# they need not be woken within a unit of work, and no longer (0.3 ms), since the sockets, and a device on this machine,
# want the cores. 512 tokens through 30 layers took 202 ms forward where they sleep late, 323 to 380 where they sleep at
# once. libgomp, the OpenMP of torch on Linux, reads it when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
