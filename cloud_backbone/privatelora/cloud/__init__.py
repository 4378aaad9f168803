"""The service's half: the frozen model, its adapter sets, and the data plane that devices compute over."""

import os

# torch's idle threads sleep at once instead of looking for work. On two idle cores that costs a service up to a third
# of its speed in training; beside other work the opposite costs far more (a demo of 146 s took 429 s). OpenMP reads it
# when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
