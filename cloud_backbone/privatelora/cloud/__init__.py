"""The service's half: the frozen model, its adapter sets, and the data plane that devices compute over."""

import os

# torch's idle threads would spin between two units of work, on the core that the sockets need, and a device on this
# machine. OpenMP reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
