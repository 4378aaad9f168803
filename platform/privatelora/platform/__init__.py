"""The platform: composes service and device behind the `privatelora` command, with its settings in one place."""

import os

# As in `privatelora.cloud` and `privatelora.device`, here for modules that import torch before either of them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
